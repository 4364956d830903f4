"""Several processes on one machine: starting them, and what they tell each other.

A stage with ``run.processes`` above 1 starts itself that many times with torch's launcher; one
that was started so (also by ``accelerate launch`` or ``torchrun``) joins the others through
Accelerate. The process of rank 0 alone writes results and shows progress. Alone, a process is
rank 0 of 1 and nothing here costs anything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from lib.base.errors import LutqatError, ParamsError

_FAILED_TOGETHER = (-signal.SIGTERM, -signal.SIGINT)  # how the launcher stops the others


class WorkerError(LutqatError):
    """A process of several died without a message of its own."""

    exit_code = 10


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and talks."""
    return rank() == 0


@cache
def _joined(cpu: bool) -> None:
    from accelerate import PartialState

    PartialState(cpu=cpu)


def join(device: torch.device) -> torch.device:
    """Meet the other processes and return this one's device: of several GPUs its own. No effect
    alone."""
    if world_size() == 1:
        return device
    _joined(device.type == "cpu")
    if device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def total(values: Tensor) -> Tensor:
    """Elementwise sum of every process's tensor, in every process."""
    if world_size() == 1:
        return values
    from accelerate.utils import reduce

    summed = reduce(values, reduction="sum")
    assert isinstance(summed, Tensor)
    return summed


def wait_for_everyone() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def start_workers(stage: str, processes: int) -> bool:
    """Run this very stage in ``processes`` processes and wait for them.

    Returns:
        False where there is nothing to start: one process is enough, or this is one of several
        already. The caller then does the work itself.

    Raises:
        WorkerError: one of them was killed or failed; the others were stopped.
        SystemExit: one of them ended with an error message; its exit code is passed on.
        ParamsError: more processes than GPUs.
    """
    if processes == 1 or "RANK" in os.environ:
        return False
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ParamsError(
            f"run.processes {processes} is above this machine's {torch.cuda.device_count()} GPUs; "
            "use at most one process per GPU"
        )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"lutqat-{stage}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    command = ["-W", "ignore", "-m", f"stages.{stage}", *sys.argv[1:]]
    with _shared_cores(processes):
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            raise _explained(stage, error.failures, processes) from None
    return True


@contextlib.contextmanager
def _shared_cores(processes: int) -> Iterator[None]:
    """Give each process its share of the cores, unless the user has said how many threads."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _explained(stage: str, failures: Mapping[int, object], processes: int) -> BaseException:
    """The first failure that is not the launcher's own doing, as an error or an exit."""
    codes = {number: int(getattr(f, "exitcode", 1)) for number, f in failures.items()}
    guilty = [n for n, code in codes.items() if code not in _FAILED_TOGETHER] or list(codes)
    first = guilty[0]
    code = codes[first]
    if code > 1:  # it has printed its own line
        return SystemExit(code)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit {code})"
    return WorkerError(
        f"{stage}: process {first} of {processes} {how}; the others were stopped. Run the same "
        "command again: it goes on where the last state was saved"
    )
