"""headroom.svg: how far every layer is from infinity."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.ane.check import CheckResult
from lib.ane.headroom import headroom, matmul_headroom
from lib.ane.products import MATMUL_LIMIT, Mode
from lib.quant.fp16 import FP16_MAX, FP16_MAX_SQUARABLE


def draw_headroom(result: CheckResult) -> Figure:
    """Headroom of every module in the order of execution: any result, and matrix products."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    places: dict[str, int] = {}
    for form, modes in result.forms.items():
        # what is zero throughout has no headroom to show
        records = [r for r in modes[Mode.WIDE].records if r.max_abs > 0]
        for record in records:
            places.setdefault(record.module, len(places))
        _points(above, places, _lowest((r.module, headroom(r)) for r in records), form)
        products = (r for r in records if r.is_matmul)
        _points(below, places, _lowest((r.module, matmul_headroom(r)) for r in products), form)
    norms = {
        name: FP16_MAX_SQUARABLE / peak for name, peak in result.norm_peaks.items() if peak > 0
    }
    above.plot(
        [places[name] for name in norms if name in places],
        [value for name, value in norms.items() if name in places],
        "x",
        color="gray",
        markersize=4,
        label=f"input of a plain norm against {FP16_MAX_SQUARABLE:.0f}",
    )
    above.set_title("FP16 headroom per layer (emulated, not run on an ANE)")
    above.set_ylabel(f"{FP16_MAX:.0f} / largest result")
    below.set_ylabel(f"{MATMUL_LIMIT:.0f} / largest matrix product")
    below.set_xlabel("layer, in the order of execution")
    _name_blocks(below, places)
    for axes in (above, below):
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    return figure


def _lowest(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The smallest headroom of each module."""
    lowest: dict[str, float] = {}
    for name, value in pairs:
        lowest[name] = min(lowest.get(name, value), value)
    return lowest


def _points(axes: Axes, places: dict[str, int], values: dict[str, float], form: str) -> None:
    axes.plot([places[n] for n in values], list(values.values()), ".", markersize=4, label=form)


def _name_blocks(axes: Axes, places: dict[str, int]) -> None:
    """A tick where each decoder block begins, labelled by its number."""
    starts: dict[str, int] = {}
    for name, place in places.items():
        _, found, rest = name.partition(".layers.")
        if found:
            starts.setdefault(rest.split(".")[0], place)
    axes.set_xticks(list(starts.values()), list(starts), fontsize="x-small")
