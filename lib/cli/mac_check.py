"""`lutqat mac-check`: an exported package in Core ML, against the logits expected of it.

Nothing here says that something ran on the Neural Engine: MLComputePlan tells which device Core ML
prefers for each operation, and predictions do not tell where they ran.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib.cli import mac_runtime
from lib.cli.mac_runtime import CoreMLRuntime, Placement, Units
from lib.export.names import EXPECTED, FUNCTIONS, PACKAGE, SETTINGS

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table
    from torch import Tensor


STATEMENT = (
    "Devices are what MLComputePlan reports as preferred; a prediction does not tell where it ran."
)
WARM_UP = 3  # predictions of each function before timing starts
_WIDTH = 120  # columns where stdout is no terminal
_DEVICES = {"ANE": "Neural Engine", "GPU": "GPU", "CPU": "CPU", None: "not reported"}


def mac_check(
    package: Annotated[
        Path,
        typer.Argument(
            help=f"A folder that the export stage wrote, with {PACKAGE} and {EXPECTED}.",
            show_default=False,
        ),
    ],
    units: Annotated[Units, typer.Option(help="What Core ML may use.")] = Units.CPU_AND_NE,
    calls: Annotated[int, typer.Option(min=1, help="Timed predictions of each function.")] = 50,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write everything found here.", show_default=False
        ),
    ] = None,
) -> None:
    """On a Mac: which device Core ML prefers for each operation, correctness and speed.

    Example: lutqat mac-check runs/export/packages/coreml --json mac.json
    """
    mac_runtime.require_macos()
    folder = package.parent if package.suffix == Path(PACKAGE).suffix else package
    expected = read_expected(folder)

    from rich.console import Console

    from lib.base.files import write_json

    runtime = mac_runtime.CoreMLRuntime(folder / PACKAGE, units)
    findings = check(runtime, expected, calls)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(to_table(findings))
    console.print(STATEMENT)
    if json_file is not None:
        write_json(json_file, to_json(findings, folder, units))


@dataclass(frozen=True)
class Expected:
    """What the export stage stored beside the package.

    Attributes:
        ids: token ids of a held-out text.
        logits: ``[N, V]`` expected after each of them.
        tokens: S, tokens of a call of ``prefill``.
        slots: T, the longest text that the cache holds.
    """

    ids: list[int]
    logits: Tensor
    tokens: int
    slots: int


@dataclass(kw_only=True)
class Findings:
    """What is known of one function.

    Attributes:
        tokens: of one call.
        positions: compared with the expected logits.
        kl, top1: against the expected logits; kl is NaN where logits are not finite.
        non_finite: logits that are NaN or infinite.
        seconds: of one prediction, the median.
        placements: every operation, constants left out.
    """

    tokens: int
    positions: int
    kl: float
    top1: float
    non_finite: int
    seconds: float
    placements: list[Placement] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def devices(self) -> dict[str, int]:
        """Operations by the device that Core ML prefers for them."""
        counts = Counter(placement.device for placement in self.placements)
        return {name: counts[device] for device, name in _DEVICES.items()}

    def elsewhere(self) -> list[Placement]:
        """Operations for which Core ML does not prefer the Neural Engine."""
        return [placement for placement in self.placements if placement.device != "ANE"]


def read_expected(folder: Path) -> Expected:
    """Inputs and logits that the export stage stored.

    Raises:
        InputError: a file is missing.
        CorruptError: the file is not what the export stage writes.
    """
    from safetensors import SafetensorError, safe_open

    from lib.base.errors import CorruptError, InputError

    for name in (PACKAGE, EXPECTED):
        if not (folder / name).exists():
            raise InputError(
                f"{folder} holds no {name}; give the Core ML folder that the export stage wrote"
            )
    path = folder / EXPECTED
    try:
        with safe_open(str(path), "pt") as file:
            settings = json.loads((file.metadata() or {})[SETTINGS])
            ids, logits = (file.get_tensor(name) for name in ("ids", "logits"))
        tokens, slots = (int(settings[name]) for name in ("tokens", "slots"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptError(f"{path} is not what the export stage writes ({error})") from None
    if not 2 <= len(ids) == len(logits) or len(ids) > slots:
        raise CorruptError(
            f"{path} has {len(ids)} ids and logits of {len(logits)} positions for a cache of "
            f"{slots}; export again"
        )
    return Expected(ids.tolist(), logits.float(), tokens, slots)


class _Text:
    """One text in the package's cache, fed by its two functions."""

    def __init__(self, runtime: CoreMLRuntime, expected: Expected) -> None:
        self._runtime, self._expected = runtime, expected
        self._state = runtime.make_state()
        self._length = 0

    def feed(self, function: str, ids: list[int]) -> Tensor:
        """Logits ``[len(ids), V]`` after each of the tokens that come next."""
        import torch

        from lib.export.graph import join_logits

        width = tokens_of(function, self._expected)
        parts = []
        for start in range(0, len(ids), width):
            chunk = ids[start : start + width]
            inputs = call_inputs(chunk, self._length, width, self._expected.slots)
            outputs = self._runtime.predict(function, inputs, self._state)
            logits = {name: torch.from_numpy(value) for name, value in outputs.items()}
            parts.append(join_logits(logits)[: len(chunk)])
            self._length += len(chunk)
        return torch.cat(parts)


def tokens_of(function: str, expected: Expected) -> int:
    """Tokens of one call."""
    return expected.tokens if function == FUNCTIONS[0] else 1


def call_inputs(ids: list[int], start: int, tokens: int, slots: int) -> dict[str, np.ndarray]:
    """A call's inputs as arrays (Core ML takes float32 where it computes in FP16)."""
    from lib.export.graph import step_inputs

    named = step_inputs(ids, start, tokens, slots).named()
    return {name: value.numpy() for name, value in named.items()}


def check(runtime: CoreMLRuntime, expected: Expected, calls: int) -> dict[str, Findings]:
    """Everything that is looked at, by function.

    ``prefill`` gets the whole text. ``decode`` goes on, token by token, from the middle of a text
    whose first half ``prefill`` put into the same cache.

    Raises:
        MismatchError: the package has another vocabulary than the expected logits.
    """
    half = len(expected.ids) // 2
    whole, split = _Text(runtime, expected), _Text(runtime, expected)
    found = {FUNCTIONS[0]: whole.feed(FUNCTIONS[0], expected.ids)}
    split.feed(FUNCTIONS[0], expected.ids[:half])
    found[FUNCTIONS[1]] = split.feed(FUNCTIONS[1], expected.ids[half:])
    placements = runtime.placements()
    return {
        function: Findings(
            tokens=tokens_of(function, expected),
            **compare(logits, expected.logits[-len(logits) :]),
            seconds=seconds_per_call(runtime, expected, function, calls),
            placements=[p for p in placements if p.function == function],
        )
        for function, logits in found.items()
    }


def compare(logits: Tensor, expected: Tensor) -> dict[str, Any]:
    """Agreement of ``[N, V]`` logits with those expected."""
    from lib.base.errors import MismatchError
    from lib.distill.compare import Agreement

    if logits.shape != expected.shape:
        raise MismatchError(
            f"the package makes {logits.shape[1]} logits per token, {EXPECTED} holds "
            f"{expected.shape[1]}; export again"
        )
    agreement = Agreement()
    agreement.add(logits, expected)
    return {
        "positions": agreement.positions,
        "kl": agreement.kl,
        "top1": agreement.top1,
        "non_finite": int((~logits.isfinite()).sum()),
    }


def seconds_per_call(
    runtime: CoreMLRuntime, expected: Expected, function: str, calls: int
) -> float:
    """Median time of a prediction after warm-up; the same call again and again."""
    width = tokens_of(function, expected)
    state = runtime.make_state()
    times = []
    for number in range(WARM_UP + calls):
        inputs = call_inputs(expected.ids[:width], 0, width, expected.slots)
        started = time.perf_counter()
        runtime.predict(function, inputs, state)
        if number >= WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def to_table(findings: dict[str, Findings]) -> Table:
    """A column per function."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for function in findings:
        table.add_column(function, overflow="fold")
    columns = findings.values()

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    for device in _DEVICES.values():
        row(f"operations, {device}", *(str(f.devices()[device]) for f in columns))
    row("not on the Neural Engine", *(_kinds(f.elsewhere()) for f in columns))
    row("positions compared", *(str(f.positions) for f in columns))
    row("KL(expected || package)", *(f"{f.kl:.3g}" for f in columns))
    row("top-1 agreement", *(f"{f.top1:.4f}" for f in columns))
    row("logits not finite", *(str(f.non_finite) for f in columns))
    row("tokens per call", *(str(f.tokens) for f in columns))
    row("ms per call", *(f"{f.seconds * 1e3:.2f}" for f in columns))
    row("tokens/s", *(f"{f.tokens_per_second:.1f}" for f in columns))
    return table


def _kinds(placements: list[Placement]) -> str:
    """``CPU gather x2, ...``, the most frequent first."""
    counts = Counter(f"{p.device or 'not reported:'} {p.kind}" for p in placements)
    return ", ".join(f"{name} x{count}" for name, count in counts.most_common()) or "-"


def to_json(findings: dict[str, Findings], folder: Path, units: Units) -> dict[str, Any]:
    """Plain values; KL is null where logits are not finite."""
    import platform
    from importlib.metadata import version

    from lib.base.numbers import finite

    return {
        "package": str(folder / PACKAGE),
        "statement": STATEMENT,
        "macos": platform.mac_ver()[0],
        "machine": platform.machine(),
        "coremltools": version("coremltools"),
        "units": units.value,
        "functions": {
            function: {
                "devices": f.devices(),
                "not_on_neural_engine": [asdict(placement) for placement in f.elsewhere()],
                "positions": f.positions,
                "kl": finite(f.kl),
                "top1": f.top1,
                "non_finite_logits": f.non_finite,
                "tokens_per_call": f.tokens,
                "seconds_per_call": f.seconds,
                "tokens_per_second": f.tokens_per_second,
            }
            for function, f in findings.items()
        },
    }
