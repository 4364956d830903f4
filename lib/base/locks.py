"""Locks between processes. They are the operating system's, so they end with the process that
holds them, however that dies. Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lib.base.errors import BusyError
from lib.base.files import fingerprint

SCRATCH = ".ckpt"


def work_root() -> Path:
    """Root of the main repository: also for runs in DVC's temporary and queued workspaces."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


@contextlib.contextmanager
def held(file: Path, stage: str, what: str) -> Iterator[None]:
    """Hold the lock ``file``; ``what`` it stands for is said to whoever comes second.

    Raises:
        BusyError: another process (or thread) holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"stage {stage} is already running in another process (it holds {what}); "
            "wait for it or stop it, then run the same command again"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def sole_writer(stage: str, out: Path) -> Iterator[None]:
    """Hold the folder ``out`` against a second run of the stage, whose temporary files have the
    same names. A process that a launcher started relies on that.

    Raises:
        BusyError: another process is writing there.
    """
    if "RANK" in os.environ:
        yield
        return
    mark = fingerprint(str(out.resolve()))
    with held(work_root() / SCRATCH / "outputs" / f"{mark}.lock", stage, str(out)):
        yield
