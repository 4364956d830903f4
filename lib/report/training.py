"""Sections on the way there: loss curves, and what is known of every layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lib.report.experiment import ANE, GRID, SCORES, Experiment
from lib.report.parts import Figure, Figures, Key, Note, Pair, Part, absent
from lib.report.svg import Series, heat, plot

WIDE = (1040, 300)  # user units of a chart that stands alone
TRAIN, HELD_OUT = "kd_loss", "val_kd_loss"
CURVES = (  # column of log.csv, what it is, tone, faint
    (TRAIN, "training", 0, True),
    (HELD_OUT, "held out", 0, False),
    ("val_soft_kd_loss", "held out, before rounding", 2, False),
)
LAYER = re.compile(r"\.layers\.(\d+)(?:\.(.+))?$")


def curves(pair: Pair) -> list[Part]:
    """The losses of every training stage, and of all of them in a row."""
    if not any(one.logs for one in pair.both):
        return [absent("No training stage left a log.csv here.")]
    parts: list[Part] = [Figures(figures=[_journey(pair)], wide=True)]
    logged = [stage for stage in pair.this.stages if any(stage in one.logs for one in pair.both)]
    trained = [stage for stage in logged if _trained(pair, stage)]
    parts.append(Figures(figures=[_stage_curves(pair, stage) for stage in trained]))
    idle = [stage for stage in logged if stage not in trained]
    if idle:
        parts.append(
            Note(lines=[f"No steps in {', '.join(idle)}: the model was handed on as it came."])
        )
    for one in pair.both:
        missing = [s for s in training_stages(one) if s not in one.logs]
        if missing:
            name = f"{one.name}: no" if pair.other else "No"
            cause = ", or DVC's cache lacks it" if one.commit else ""
            parts.append(absent(f"{name} log.csv of {', '.join(missing)}{cause}."))
    return parts


def training_stages(one: Experiment) -> list[str]:
    """Stages whose parameters have optimizer steps."""
    sections = one.params
    return [
        stage
        for stage in one.stages
        if isinstance(sections.get(stage), dict) and "steps" in sections[stage]
    ]


def _trained(pair: Pair, stage: str) -> bool:
    return any(_steps(one, stage) for one in pair.both)


def _steps(one: Experiment, stage: str) -> float:
    return max((row["step"] for row in one.logs.get(stage, [])), default=0.0)


def _points(rows: Iterable[dict[str, float]], column: str, offset: float = 0) -> list[Any]:
    return [(offset + row["step"], row[column]) for row in rows if column in row]


def _stage_curves(pair: Pair, stage: str) -> Figure:
    """One stage: training and held-out loss, of both experiments."""
    series, keys = [], []
    for number, one in enumerate(pair.both):
        for column, what, tone, faint in CURVES:
            points = _points(one.logs.get(stage, []), column)
            if not points:
                continue
            name = f"{what}, {one.name}" if pair.other else what
            curve = Series(
                name=name,
                points=points,
                tone=tone + number,
                faint=faint,
                dots=not faint,
                other=bool(number),
            )
            series.append(curve)
            keys.append(Key(name=name, classes=curve.classes))
    said = f"{stage}: distillation loss by optimizer step. {_ends(pair, stage)}"
    chart = plot(series, said, x_label="optimizer step", y_label="distillation loss")
    return Figure(title=stage, svg=chart, keys=keys, note=_ends(pair, stage))


def _ends(pair: Pair, stage: str) -> str:
    """The held-out loss at the beginning and at the end, in words."""
    told = []
    for one in pair.both:
        losses = [loss for _, loss in _points(one.logs.get(stage, []), HELD_OUT)]
        if losses:
            name = f"{one.name}: " if pair.other else ""
            told.append(f"{name}{losses[0]:.4g} → {losses[-1]:.4g}")
    return f"Held out {'; '.join(told)}." if told else ""


def _journey(pair: Pair) -> Figure:
    """Held-out losses of all stages after one another."""
    series, keys = [], []
    marks: dict[float, str] = {}
    for number, one in enumerate(pair.both):
        start = 0.0
        for tone, stage in enumerate(stage for stage in one.stages if stage in one.logs):
            if not _steps(one, stage):
                continue
            curve = Series(
                name=f"{stage}, {one.name}" if pair.other else stage,
                points=_points(one.logs[stage], HELD_OUT, start),
                tone=tone,
                other=bool(number),
            )
            series.append(curve)
            keys.append(Key(name=curve.name, classes=curve.classes))
            if not number:
                marks[start] = stage
            start += _steps(one, stage)
    title = "Held-out distillation loss along the pipeline"
    stages = ", ".join(key.name for key in keys)
    chart = plot(
        series,
        f"{title}: {stages}.",
        x_label="optimizer steps, all stages after one another",
        y_label="distillation loss",
        size=WIDE,
        marks=list(marks.items()),
    )
    note = (
        "Each stage is drawn from where the one before it ended; a jump between two is what the "
        "stage between them (conversion, snap) changed."
    )
    return Figure(title=title, svg=chart, keys=keys, note=note)


def layers(pair: Pair) -> list[Part]:
    """What is recorded of every layer, as maps of kind by decoder block."""
    parts: list[Part] = []
    for path, title, unit, note in MAPS:
        found = [(one, rows) for one, rows in ((o, _map(o, path)) for o in pair.both) if rows]
        if not found:
            parts.append(absent(f"{title}: no {path}."))
            continue
        for one, rows in found:
            name = f"{title}, {one.name}" if pair.other else title
            worst = ", ".join(f"{kind} of block {block}" for kind, block in _highest(rows, 3))
            chart = heat(rows, f"{name}, by layer. Highest: {worst}.", unit=unit)
            said = f"{note} Highest: {worst}."
            parts.append(Figures(figures=[Figure(title=name, svg=chart, note=said)], wide=True))
    return parts


MAPS = (
    (
        SCORES,
        "Sensitivity",
        "",
        "How much each layer matters before any training, as stage sensitivity scored it.",
    ),
    (
        GRID,
        "Distance of the weights from their grid",
        "steps²",
        "Mean squared distance after stage weights, in squared steps between two levels.",
    ),
    (
        ANE,
        "Error that FP16 arithmetic makes",
        "relative",
        "Relative to the layer's result in float32, emulated by stage ane_check.",
    ),
)
"""The per-layer records: file, what they are, unit, explanation."""


def _map(one: Experiment, path: str) -> dict[str, dict[int, float]]:
    """Kind of layer -> decoder block -> value; empty where nothing is recorded."""
    content = one.files.get(path)
    if not content:
        return {}
    if path == SCORES:
        return by_kind(content)
    if path == GRID:
        return by_kind({name: values["distance"] for name, values in content["layers"].items()})
    for modes in content["against_float32"]["forms"].values():
        for values in modes.values():
            if values["relative_errors"]:
                return by_kind(values["relative_errors"])
    return {}


def by_kind(values: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Values of layers by the end of their name and by decoder block; what has none is left out."""
    kinds: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        found = LAYER.search(name)
        if found and value is not None:
            kind = (found[2] or "block").rsplit(".", 1)[-1]
            kinds.setdefault(kind, {})[int(found[1])] = float(value)
    return kinds


def _highest(rows: dict[str, dict[int, float]], count: int) -> list[tuple[str, int]]:
    cells = [(value, kind, block) for kind, row in rows.items() for block, value in row.items()]
    return [(kind, block) for _, kind, block in sorted(cells, reverse=True)[:count]]
