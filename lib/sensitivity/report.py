"""The outputs: scores.json, scores.svg and metrics.json."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from lib.base.figures import write_svg
from lib.base.files import write_json
from lib.model.scores import block_scores, by_kind

MEANING = {
    "fisher": "mean squared gradient of the KD loss",
    "perturbation": "rise of the held-out KD loss",
    "file": "score, as given",
}
"""What a score is, by `sensitivity.method`."""


def metrics(blocks: list[float]) -> dict[str, Any]:
    """Few numbers of the decoder blocks' scores."""
    highest = max(blocks)
    return {
        "sensitivity": {
            "most_sensitive": blocks.index(highest),
            "highest": highest,
            "median": median(blocks),
            "lowest": min(blocks),
        }
    }


def draw_scores(scores: dict[str, float], blocks: list[float], method: str) -> Figure:
    """Score of every decoder block as a bar, and of its projections as a line per kind."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(blocks)), blocks, color="lightgray", label="block (mean)")
    for kind, values in by_kind(scores).items():
        axes.plot(list(values), list(values.values()), ".-", linewidth=0.8, label=kind)
    shown = [*scores.values(), *blocks]
    if min(shown) > 0:
        axes.set_yscale("log")
    elif any(shown):  # a logarithm that passes zero
        axes.set_yscale("symlog", linthresh=min(abs(value) for value in shown if value))
    axes.set_title(f"sensitivity ({method})")
    axes.set_xlabel("decoder block")
    axes.set_ylabel(MEANING[method])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", ncols=2)
    return figure


def write_report(scores: dict[str, float], blocks: int, method: str, folder: Path) -> None:
    """Write the three files into ``folder``.

    Args:
        blocks: number of decoder blocks; method: `sensitivity.method`.

    Raises:
        MismatchError: see :func:`lib.model.scores.block_scores`.
    """
    of_blocks = block_scores(scores, blocks)
    write_json(folder / "scores.json", scores)
    write_svg(folder / "scores.svg", draw_scores(scores, of_blocks, method))
    write_json(folder / "metrics.json", metrics(of_blocks))
