"""The ladder's outputs: ladder.json, ladder.md, ladder.svg, samples.json and the metrics."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib.base.figures import write_svg
from lib.base.files import write_json, write_text
from lib.base.numbers import finite
from lib.evaluate.ladder import Ladder, Row
from lib.evaluate.tasks import Score

COLUMNS = (
    "model",
    "perplexity",
    "x teacher",
    "KL",
    "top-1",
    "bits/weight",
    "bits/weight, layers",
    "packed MB",
    "folder MB",
    "peak memory MB",
)


def metrics(ladder: Ladder, *, q4: str, q2: str) -> dict[str, Any]:
    """Few named numbers; ``q4`` and ``q2`` name the rows that stand for the two results."""
    teacher, four, two = ladder.rows[0], ladder.row(q4), ladder.row(q2)
    return {
        "evaluate": {
            "teacher_ppl": finite(teacher.perplexity),
            "q4_ppl": finite(four.perplexity),
            "q4_ratio": finite(four.ratio),
            "q2_ppl": finite(two.perplexity),
            "q2_ratio": finite(two.ratio),
            "q2_kl": finite(two.kl),
            "q2_top1": two.top1,
            "bits_per_weight": two.size.bits_per_weight,
            "packed_mb": two.size.megabytes,
            "folder_mb": finite(two.file_mb),
            **_task_metrics({"teacher": teacher, "q4": four, "q2": two}),
        }
    }


def _task_metrics(rows: dict[str, Row]) -> dict[str, float | None]:
    """Accuracy by row and task, say `q4_piqa` or `q4_package_piqa`; empty without tasks."""
    return {
        f"{short}_{task.replace(':', '_')}": finite(score.shown[0])
        for short, row in rows.items()
        for task, score in row.tasks.items()
    }


def to_json(ladder: Ladder) -> dict[str, Any]:
    """All rows in plain values; what depends on the machine stands under ``machine``."""
    peaks = {row.name: row.peak_memory_mb for row in ladder.rows}
    return {
        "scored_tokens": ladder.scored_tokens,
        "scored_positions": ladder.scored_positions,
        **({"task_seed": ladder.task_seed} if ladder.rows[0].tasks else {}),
        "rows": [_row_json(row) for row in ladder.rows],
        "machine": {**ladder.machine, "peak_memory_mb": peaks},
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "model": row.name,
        "perplexity": finite(row.perplexity),
        "ratio": finite(row.ratio),
        "kl": finite(row.kl),
        "top1": row.top1,
        "bits_per_weight": row.size.bits_per_weight,
        "bits_per_layer_weight": row.size.bits_per_layer_weight,
        "packed_mb": row.size.megabytes,
        "folder_mb": row.file_mb,
        **({"tasks": _tasks_json(row)} if row.tasks else {}),
    }


def _tasks_json(row: Row) -> dict[str, dict[str, float | None]]:
    return {
        task: {key: finite(value) for key, value in asdict(score).items()}
        for task, score in row.tasks.items()
    }


def _short(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if value < 1e5 else f"{value:.3g}"


def _percent(score: Score) -> str:
    """Accuracy in per cent, with its standard error where there is one."""
    share, error = score.shown
    return f"{100 * share:.1f}" + ("" if math.isnan(error) else f" +- {100 * error:.1f}")


def to_markdown(ladder: Ladder) -> str:
    """One table, a row per model."""
    asked = ladder.rows[0].tasks
    columns = [*COLUMNS, *(f"{task} %" for task in asked)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in ladder.rows:
        cells = [
            row.name,
            _short(row.perplexity),
            _short(row.ratio, 3),
            _short(row.kl, 4),
            _short(row.top1, 4),
            _short(row.size.bits_per_weight),
            _short(row.size.bits_per_layer_weight),
            _short(row.size.megabytes, 1),
            _short(row.file_mb, 1),
            _short(row.peak_memory_mb, 0),
            *(_percent(row.tasks[task]) for task in asked),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Perplexity over {ladder.scored_tokens} test tokens, each scored once. KL(teacher || "
        f"model) and top-1 agreement over {ladder.scored_positions} positions. Packed MB is "
        "the memory that the packed model takes: indices, LUTs, scales, and FP16 for the rest; the "
        "folder of a training stage also holds float32 masters.",
    ]
    if asked:
        counted = ", ".join(
            f"{task} ({score.items} of {score.of} items"
            f"{'' if score.acc_norm is None else ', by length'})"
            for task, score in asked.items()
        )
        lines[-1] += (
            " Zero-shot accuracy +- standard error, items drawn with seed "
            f'{ladder.task_seed}, "by length": choices compared by log-probability per character: '
            f"{counted}."
        )
    return "\n".join(lines) + "\n"


def draw(ladder: Ladder) -> Figure:
    """Perplexity and KL of every row, on logarithmic axes."""
    names = [row.name for row in ladder.rows]
    places = list(range(len(names)))
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    left.bar(places, [finite(row.perplexity) or 0.0 for row in ladder.rows], color="tab:blue")
    left.axhline(ladder.rows[0].perplexity, color="black", linewidth=0.8, linestyle="--")
    left.set_title("perplexity (dashed: teacher)")
    right.plot(places, [finite(row.kl) for row in ladder.rows], "o-", color="tab:red")
    right.set_title("KL from the teacher, nats, and top-1 agreement")
    for place, row in zip(places, ladder.rows, strict=True):
        if finite(row.perplexity) is not None:
            left.annotate(_short(row.perplexity, 1), (place, row.perplexity), ha="center")
        if finite(row.kl) is not None:
            right.annotate(f"{row.top1:.0%}", (place, row.kl), ha="center", va="bottom")
    left.set_yscale("log")
    right.set_yscale("symlog", linthresh=0.01)
    for axes in (left, right):
        axes.set_xticks(places, names, rotation=40, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_ladder(ladder: Ladder, folder: Path, *, q4: str, q2: str) -> None:
    """Write the four outputs and metrics.json into ``folder``."""
    write_json(folder / "ladder.json", to_json(ladder))
    write_text(folder / "ladder.md", to_markdown(ladder))
    write_svg(folder / "ladder.svg", draw(ladder))
    answers = {row.name: row.samples for row in ladder.rows}
    write_json(folder / "samples.json", {"prompts": ladder.prompts, "answers": answers})
    write_json(folder / "metrics.json", metrics(ladder, q4=q4, q2=q2))
