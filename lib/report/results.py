"""Sections on what came out: ladder, sizes, samples, metrics."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from lib.report.experiment import EXPORT, LADDER, SAMPLES, Experiment
from lib.report.parts import (
    Answer,
    Columns,
    Figure,
    Figures,
    Fold,
    Key,
    Note,
    Pair,
    Part,
    Samples,
    Table,
    absent,
)
from lib.report.svg import Bar, bars
from lib.report.values import DASH, TIMES, change, flatten, lookup, short, shown

Q4, Q2, SNAPPED = "finetune", "finetune_q2", "snap"
SIDE_BY_SIDE = ("teacher", Q4, Q2, SNAPPED, "+ adapter")
TEACHER_TONE = 7
# key of a row of ladder.json, heading, decimals
MEASURES = (
    ("perplexity", "perplexity", 2),
    ("ratio", f"{TIMES} teacher", 3),
    ("kl", "KL, nats", 4),
    ("top1", "top-1", 4),
    ("bits_per_weight", "bits/weight", 2),
    ("bits_per_layer_weight", "… layers", 2),
    ("packed_mb", "packed MB", 1),
    ("folder_mb", "folder MB", 1),
)
COMPARED = ("perplexity", "kl", "top1", "bits_per_weight", "packed_mb")


def ladder_rows(one: Experiment) -> dict[str, dict[str, Any]]:
    """Model -> what `evaluate` measured of it, the teacher first; empty where it did not run."""
    ladder = one.files.get(LADDER) or {"rows": []}
    return {str(row["model"]): row for row in ladder["rows"]}


def ladder(pair: Pair) -> list[Part]:
    """The models by quality: charts, and every number."""
    if not pair.files(LADDER):
        return [absent(f"Stage evaluate left no {LADDER}.")]
    parts: list[Part] = [
        Figures(
            figures=[
                _model_bars(pair, "ratio", "Perplexity, as a multiple of the teacher's", 3),
                _model_bars(pair, "kl", "KL from the teacher, nats per token", 4),
                _model_bars(pair, "top1", "Same most probable token as the teacher", 3),
            ]
        )
    ]
    parts += [_compared_ladder(pair)] if pair.other else [_ladder_table(pair.this)]
    for one, values in pair.files(LADDER):
        parts.append(Note(lines=[_how_measured(one.name if pair.other else "", values)]))
    return parts


def _names(pair: Pair) -> list[str]:
    """Models of either experiment, in the ladder's order."""
    return list(dict.fromkeys(name for one in pair.both for name in ladder_rows(one)))


def _model_bars(pair: Pair, key: str, title: str, digits: int) -> Figure:
    rows = []
    for name in _names(pair):
        for number, one in enumerate(pair.both):
            value = ladder_rows(one).get(name, {}).get(key)
            rows.append(
                Bar(
                    label="" if number else name,
                    value=value,
                    text=DASH if value is None else short(value, digits),
                    tone=TEACHER_TONE if name == "teacher" else 0,
                    other=bool(number),
                )
            )
    said = ", ".join(f"{row.label} {row.text}".strip() for row in rows)
    return Figure(title=title, svg=bars(rows, f"{title}: {said}"), keys=_experiment_keys(pair))


def _experiment_keys(pair: Pair) -> list[Key]:
    """A legend that tells the two experiments apart; empty for one."""
    if pair.other is None:
        return []
    return [
        Key(name=pair.this.name, classes="t0 box"),
        Key(name=pair.other.name, classes="t0 other box"),
    ]


def _tasks(one: Experiment) -> list[str]:
    return list(dict.fromkeys(t for row in ladder_rows(one).values() for t in row.get("tasks", {})))


def _ladder_table(one: Experiment) -> Table:
    rows = [
        [
            name,
            *(shown(row.get(key), digits) for key, _, digits in MEASURES),
            *(_score(row.get("tasks", {}).get(task)) for task in _tasks(one)),
        ]
        for name, row in ladder_rows(one).items()
    ]
    head = ["model", *(title for _, title, _ in MEASURES), *(f"{t}, %" for t in _tasks(one))]
    return Table(caption="The ladder: every model on the same held-out text", head=head, rows=rows)


def _score(score: dict[str, Any] | None) -> Markup:
    """Normalized accuracy in per cent, with its standard error."""
    if not score or score.get("acc_norm") is None:
        return shown(None)
    error = score.get("acc_norm_stderr")
    return Markup("{}{}").format(
        shown(100 * score["acc_norm"], 1), "" if error is None else f" ± {100 * error:.1f}"
    )


def _compared_ladder(pair: Pair) -> Table:
    assert pair.other is not None
    ours, theirs = ladder_rows(pair.this), ladder_rows(pair.other)
    measures = [m for m in MEASURES if m[0] in COMPARED]
    rows = []
    for name in _names(pair):
        cells: list[str | Markup] = [name]
        for key, _, digits in measures:
            new, old = (values.get(name, {}).get(key) for values in (ours, theirs))
            cells += [shown(new, digits), shown(old, digits), change(new, old, digits, share=False)]
        rows.append(cells)
    return Table(
        caption=f"The ladders of {pair.this.name} and {pair.other.name}, side by side",
        groups=[("", 1), *((title, 3) for _, title, _ in measures)],
        head=["model", *([pair.this.name, pair.other.name, "change"] * len(measures))],
        rows=rows,
    )


def _how_measured(name: str, values: dict[str, Any]) -> str:
    machine = values.get("machine") or {}
    where = ", ".join(
        f"{machine[key]}{unit}"
        for key, unit in (("platform", ""), ("device", ""), ("threads", " threads"))
        if key in machine
    )
    torch = f", torch {machine['torch']}" if "torch" in machine else ""
    peaks = [v for v in (machine.get("peak_memory_mb") or {}).values() if v is not None]
    peak = f"; at most {short(max(peaks), 0)} MB of memory" if peaks else ""
    return (
        f"{name + ': perplexity' if name else 'Perplexity'} over {values['scored_tokens']:,} "
        f"tokens, KL and top-1 over {values['scored_positions']:,} positions. "
        f"{where}{torch}{peak}."
    )


def sizes(pair: Pair) -> list[Part]:
    """Bits per weight, and megabytes of the models and of what was exported."""
    parts: list[Part] = []
    if pair.files(LADDER):
        parts.append(
            Figures(
                figures=[
                    _model_bars(pair, "bits_per_weight", "Bits per weight, everything counted", 2),
                    _model_bars(pair, "bits_per_layer_weight", "… of the quantized layers", 2),
                    _model_bars(pair, "packed_mb", "Packed model, 10⁶ bytes", 1),
                ]
            )
        )
    else:
        parts.append(absent(f"Stage evaluate left no {LADDER}."))
    rows = []
    for one in pair.both:
        snap = one.metrics.get("snap", {})
        exported = one.files.get(EXPORT) or {}
        sizes = {
            "snapped: bits per quantized weight, FP16 scales and LUTs": (
                snap.get("bits_per_quantized_weight"),
                3,
            ),
            "snapped: bits per weight, all in": (snap.get("bits_per_weight"), 3),
            "snapped: packed, MB": (snap.get("megabytes"), 1),
            "every weight in FP16, MB": (exported.get("fp16_megabytes"), 1),
            **{f"exported: {k}, MB": (v, 1) for k, v in exported.get("folders", {}).items()},
        }
        rows.append({name: shown(*value) for name, value in sizes.items()})
    names = dict.fromkeys(name for row in rows for name in row)
    parts.append(
        Table(
            caption="Sizes of what is deployed",
            head=["what", *(one.name for one in pair.both)],
            rows=[[name, *(row.get(name, shown(None)) for row in rows)] for name in names],
        )
    )
    return parts


def bits_of(one: Experiment, model: str) -> str:
    """How a model of the ladder is quantized, from the parameters: "4 bits"."""
    section = "quant" if model in ("quant", "scales", "weights", Q4) else "convert"
    if model == "teacher":
        return "not quantized"
    size = lookup(one.params, f"{section}.lut_size")
    attention = lookup(one.params, f"{section}.attention_lut_size") or size
    if not isinstance(size, int) or not isinstance(attention, int) or min(size, attention) < 2:
        return ""
    mlp_bits, attention_bits = (f"{math.log2(n):g} bits" for n in (size, attention))
    if lookup(one.params, "quant.attention") is False:
        return f"{mlp_bits}, MLPs only"
    same = mlp_bits == attention_bits
    return mlp_bits if same else f"MLPs {mlp_bits}, attention {attention_bits}"


def samples(pair: Pair) -> list[Part]:
    """Each prompt with the answers of the teacher and of the models that stand for the results."""
    if not pair.files(SAMPLES):
        return [absent(f"Stage evaluate left no {SAMPLES}.")]
    prompts: dict[str, tuple[list[Answer], list[Answer]]] = {}
    for one, values in pair.files(SAMPLES):
        label = f" · {one.name}" if pair.other else ""
        answers = values["answers"]
        ordered = [name for name in SIDE_BY_SIDE if name in answers]
        for number, prompt in enumerate(values["prompts"]):
            for model in [*ordered, *(name for name in answers if name not in ordered)]:
                answer = Answer(
                    model=f"{model}{label}",
                    detail=bits_of(one, model),
                    text=str(answers[model][number]),
                )
                main, rest = prompts.setdefault(str(prompt), ([], []))
                (main if model in ordered else rest).append(answer)
    parts: list[Part] = []
    for prompt, (main, rest) in prompts.items():
        parts.append(Samples(prompt=prompt, answers=main))
        if rest:
            more: list[Part] = [Samples(prompt=prompt, answers=rest)]
            parts.append(Fold(summary=f"{len(rest)} more answers", parts=more))
    return parts


def metrics(pair: Pair) -> list[Part]:
    """Every stage's metrics.json: a small table each, or what differs and what does not."""
    if not any(one.metrics for one in pair.both):
        return [absent("No stage has metrics.")]
    parts: list[Part] = (
        _compared_metrics(pair.this, pair.other)
        if pair.other
        else [Columns(parts=[_stage_metrics(s, v) for s, v in pair.this.metrics.items()])]
    )
    for one in pair.both:
        missing = [stage for stage in one.stages if stage not in one.metrics]
        if missing:
            name = f"{one.name}: no" if pair.other else "No"
            parts.append(absent(f"{name} metrics of {', '.join(missing)}."))
    return parts


def _stage_metrics(stage: str, values: dict[str, Any]) -> Table:
    rows = [[name, shown(value)] for name, value in flatten(values).items()]
    return Table(caption=stage, head=["metric", "value"], rows=rows)


def _compared_metrics(this: Experiment, other: Experiment) -> list[Part]:
    ours, theirs = flatten(this.metrics), flatten(other.metrics)
    differ: list[list[str | Markup]] = []
    same: list[list[str | Markup]] = []
    for name in dict.fromkeys([*ours, *theirs]):
        new, old = ours.get(name), theirs.get(name)
        row: list[str | Markup] = [name, shown(new)]
        if new == old:
            same.append(row)
        else:
            differ.append([*row, shown(old), change(new, old)])
    parts: list[Part] = []
    if differ:
        head = ["metric", this.name, other.name, "change"]
        parts.append(Table(caption=f"Metrics that differ: {len(differ)}", head=head, rows=differ))
    if same:
        table = Table(caption="The same in both", head=["metric", "value"], rows=same)
        parts.append(Fold(summary=f"Metrics that are the same: {len(same)}", parts=[table]))
    return parts
