"""The page: sections in their order, rendered as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lib.report import device, origin, results, training
from lib.report.experiment import ANE, EXPORT, Experiment
from lib.report.parts import Card, Note, Pair, Part, Section
from lib.report.values import TIMES, change, lookup, prose, shown

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What reading a file raises that another version of the pipeline wrote, or that was edited."""

SECTIONS: tuple[tuple[str, str, str, Callable[[Pair], list[Part]]], ...] = (
    (
        "ladder",
        "The ladder",
        "The same held-out text, read by the teacher, the untrained quantized model and the model "
        "after every stage.",
        results.ladder,
    ),
    ("sizes", "Bits and sizes", "What the weights take, and what is exported.", results.sizes),
    (
        "training",
        "Training",
        "Distillation loss on training batches and on held-out text.",
        training.curves,
    ),
    ("layers", "Layer by layer", "A row per kind of layer, a column per block.", training.layers),
    (
        "ane",
        "Neural Engine",
        "Would FP16 hold it? Every operation of the snapped model, rounded to FP16.",
        device.gate,
    ),
    ("export", "Export", "The packages, read back and computed.", device.export),
    (
        "samples",
        "Samples",
        "What the models answer; always the most probable token.",
        results.samples,
    ),
    ("metrics", "Metrics", "Of every stage, as git and DVC keep them.", results.metrics),
    ("parameters", "Parameters", "What it was made with: params.yaml.", origin.parameters),
    ("fingerprints", "Fingerprints", "What was made from what.", origin.fingerprints),
)


def render(this: Experiment, other: Experiment | None = None) -> str:
    """The page of one experiment, or of one against another. Same experiments, same text."""
    pair = Pair(this=this, other=other)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["prose"] = prose
    teacher = this.metrics.get("teacher", {})
    source = teacher.get("source") or lookup(this.params, "teacher.source") or "lutqat"
    return environment.get_template("page.html").render(
        title=str(source),
        teacher={key: shown(value) for key, value in teacher.items() if key != "source"},
        this=this,
        other=other,
        cards=_guarded_cards(pair),
        sections=[
            Section(name=name, title=title, lead=lead, parts=_guarded(build, pair))
            for name, title, lead, build in SECTIONS
        ],
        notes=[*_faults(pair), *_guarded(origin.mixture, pair)],
    )


def _faults(pair: Pair) -> list[Part]:
    lines = [f"{one.name}: {fault}" for one in pair.both for fault in one.faults]
    return [Note(title="Files that cannot be read", lines=lines, tone="bad")] if lines else []


def _guarded(build: Callable[[Pair], list[Part]], pair: Pair) -> list[Part]:
    """A section's parts; content of another form than ours is said, not raised."""
    try:
        return build(pair)
    except MALFORMED as error:
        line = f"A file of this section has not the form that this version writes ({error!r})."
        return [Note(title="Cannot be shown", lines=[line], tone="bad")]


def _guarded_cards(pair: Pair) -> list[Card]:
    cards: list[Card] = []
    for build in (_quality, _agreement, _size, _gate, _export):
        try:
            cards += build(pair)
        except MALFORMED:  # the section below says what is wrong
            continue
    return cards


def _results(one: Experiment) -> dict[str, Any] | None:
    """The last rung without adapters: the model that is exported."""
    rows = results.ladder_rows(one)
    return rows.get(results.SNAPPED)


def _against(pair: Pair, read: Callable[[Experiment], Any], digits: int) -> list[Markup]:
    """The other experiment's value, and how far this one is from it."""
    if pair.other is None:
        return []
    new, old = read(pair.this), read(pair.other)
    if old is None:
        return [Markup("{}: {}").format(pair.other.name, "not run")]
    return [
        Markup("{}: {} · {}").format(pair.other.name, shown(old, digits), change(new, old, digits))
    ]


def _of_result(key: str) -> Callable[[Experiment], Any]:
    return lambda one: (_results(one) or {}).get(key)


def _quality(pair: Pair) -> list[Card]:
    row = _results(pair.this)
    if row is None:
        return []
    teacher = results.ladder_rows(pair.this)["teacher"]
    detail = Markup("teacher {} · {} {}").format(
        shown(teacher["perplexity"], 2), TIMES, shown(row["ratio"], 3)
    )
    more = _against(pair, _of_result("perplexity"), 2)
    return [Card(title="Perplexity", value=shown(row["perplexity"], 2), detail=[detail, *more])]


def _agreement(pair: Pair) -> list[Card]:
    row = _results(pair.this)
    if row is None:
        return []
    detail = Markup("nats per token · top-1 agreement {}").format(shown(row["top1"], 3))
    more = _against(pair, _of_result("kl"), 3)
    value = shown(row["kl"], 3)
    return [Card(title="KL from the teacher", value=value, detail=[detail, *more])]


def _size(pair: Pair) -> list[Card]:
    row = _results(pair.this)
    if row is None:
        return []
    teacher = results.ladder_rows(pair.this)["teacher"]
    detail = Markup("bits per weight {} · {} times smaller than FP16").format(
        shown(row["bits_per_weight"], 2), shown(teacher["packed_mb"] / row["packed_mb"], 2)
    )
    more = _against(pair, _of_result("packed_mb"), 1)
    value = Markup("{} MB").format(shown(row["packed_mb"], 1))
    return [Card(title="Packed model", value=value, detail=[detail, *more])]


def _gate(pair: Pair) -> list[Card]:
    report = pair.this.files.get(ANE)
    if report is None:
        return []
    word, tone = device.verdict(report["passed"])

    def worst(one: Experiment) -> Any:
        return one.metrics.get("ane_check", {}).get("worst_headroom")

    detail = Markup("least headroom {} · {} failures, {} warnings").format(
        shown(worst(pair.this), 2), len(report["failures"]), len(report["warnings"])
    )
    more = _against(pair, worst, 2)
    return [
        Card(title="FP16 check, emulated", value=Markup(word), detail=[detail, *more], tone=tone)
    ]


def _export(pair: Pair) -> list[Card]:
    report = pair.this.files.get(EXPORT)
    if report is None:
        return []
    word, tone = device.verdict(report["passed"])
    sizes = [
        Markup("{} {} MB").format(form, shown(size, 1)) for form, size in report["folders"].items()
    ]
    return [
        Card(
            title=f"Export, {report['target']}",
            value=Markup(word),
            detail=[Markup(" · ").join(sizes)],
            tone=tone,
        )
    ]
