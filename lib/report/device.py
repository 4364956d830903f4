"""Sections on the way to the device: the FP16 gate and the export."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from lib.report.experiment import ANE, EXPORT, Experiment
from lib.report.parts import Figure, Figures, Fold, Key, Note, Pair, Part, Table, absent
from lib.report.svg import Series, plot
from lib.report.training import LAYER, WIDE
from lib.report.values import shown


def verdict(passed: Any) -> tuple[str, str]:
    """Word and tone of a report's `passed`."""
    words = {True: ("passed", "good"), False: ("FAILED", "bad"), None: ("not checked", "warn")}
    return words[passed]


def gate(pair: Pair) -> list[Part]:
    """The FP16 check: verdict, headroom of every layer, comparison with float32."""
    found = pair.files(ANE)
    if not found:
        return [absent(f"Stage ane_check left no {ANE}.")]
    parts: list[Part] = []
    for one, report in found:
        name = f"{one.name}: " if pair.other else ""
        word, tone = verdict(report["passed"])
        parts.append(Note(title=f"{name}FP16 check {word}", lines=[report["ane"]], tone=tone))
        for what, tone in (("failures", "bad"), ("warnings", "warn")):
            lines = [_line(item) for item in report[what]]
            if lines:
                shown_lines = lines[:8] + [f"and {len(lines) - 8} more"] * (len(lines) > 8)
                title = f"{name}{len(lines)} {what if len(lines) > 1 else what[:-1]}"
                parts.append(Note(title=title, lines=shown_lines, tone=tone))
    parts.append(Figures(figures=[_headroom(found, pair)], wide=True))
    for one, report in found:
        name = f", {one.name}" if pair.other else ""
        parts += [_against_float32(report, name), _facts(report, name)]
    return parts


def _line(item: Any) -> str:
    """A warning, or a failure as the gate words it."""
    if not isinstance(item, dict):
        return str(item)
    where = ", ".join(str(item[key]) for key in ("form", "mode") if item.get(key))
    remedy = f"; remedy: {item['remedy']}" if item.get("remedy") else ""
    return f"{item['layer']} ({where}): {item['why']}{remedy}"


def lowest_headroom(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Form -> module -> its smallest headroom, in the order of execution."""
    return {
        form: {
            name: min(record["headroom"] for record in operations.values())
            for name, operations in modules.items()
            if operations
        }
        for form, modules in report["headroom"]["operations"].items()
    }


def _headroom(found: list[tuple[Experiment, dict[str, Any]]], pair: Pair) -> Figure:
    """How far every layer's largest result is from infinity."""
    series, keys, told = [], [], []
    places: dict[str, int] = {}
    for one, report in found:
        forms = list(lowest_headroom(report).items())
        for number, (form, lowest) in enumerate(forms[:1] if pair.other else forms):
            for name in lowest:
                places.setdefault(name, len(places))
            name = f"{form}, {one.name}" if pair.other else form
            cloud = Series(
                name=name,
                points=[(places[module], value) for module, value in lowest.items()],
                names=[f"{module}, {form}" for module in lowest],
                tone=int(one is pair.other) or number,
                line=False,
                radius=2 if number else 4,  # one form often lies on the other
                faint=not number,
                other=one is pair.other,
            )
            series.append(cloud)
            keys.append(Key(name=name, classes=f"{cloud.classes} dots"))
            worst = min(lowest, key=lambda module: lowest[module], default="")
            if worst:
                told.append(f"{name}: at least {lowest[worst]:.3g}, in {worst}")
    marks: dict[str, float] = {}
    for module, place in places.items():
        block = LAYER.search(module)
        if block:
            marks.setdefault(block[1], place)
    title = "FP16 headroom: 65504 over the largest result of every layer"
    chart = plot(
        series,
        f"{title}. {'; '.join(told)}. Below 1 a result is infinite.",
        x_label="decoder block, in the order of execution",
        y_label="headroom",
        size=WIDE,
        log=True,
        limit=1.0,
        marks=[(place, block) for block, place in marks.items()],
    )
    note = f"Below the line at 1 a result is infinite. Lowest: {'; '.join(told)}."
    return Figure(title=title, svg=chart, keys=keys, note=note)


def _against_float32(report: dict[str, Any], name: str) -> Table:
    compared = report["against_float32"]
    rows = [
        [
            f"{form}, {mode}",
            shown(values["tokens"]),
            shown(values["kl"]),
            shown(values["top1"], 4),
            shown(values["perplexity"], 4),
            shown(values["float32_perplexity"], 4),
            shown(values["non_finite_logits"]),
        ]
        for form, modes in compared["forms"].items()
        for mode, values in modes.items()
    ]
    head = ["form, mode", "tokens", "KL, nats", "top-1", "perplexity", "… in float32", "not finite"]
    return Table(caption=f"FP16 against float32{name}", head=head, rows=rows)


def _facts(report: dict[str, Any], name: str) -> Fold:
    rows = [[fact["name"], fact["status"], fact["found"]] for fact in report["graph"]]
    table = Table(
        caption=f"Facts of the graph{name}", head=["fact", "status", "found"], rows=rows, words=True
    )
    return Fold(summary=f"{len(rows)} facts of the graph{name}", parts=[table])


def export(pair: Pair) -> list[Part]:
    """What was exported, how large it is, and that it computes the same."""
    found = pair.files(EXPORT)
    if not found:
        return [absent(f"Stage export left no {EXPORT}.")]
    parts: list[Part] = []
    for one, report in found:
        name = f"{one.name}: " if pair.other else ""
        word, tone = verdict(report["passed"])
        lines = [report["statement"], *report["faults"]]
        title = f"{name}Export for {report['target']} {word}"
        parts.append(Note(title=title, lines=lines, tone=tone))
        end = f", {one.name}" if pair.other else ""
        parts.append(_packages(report, end))
        if report.get("audit"):
            parts.append(_audit(report["audit"], end))
    return parts


def _packages(report: dict[str, Any], name: str) -> Table:
    rows: list[list[str | Markup]] = []
    for form, megabytes in report["folders"].items():
        check = report["logits"].get(form) or {}
        keys = (("tokens", None), ("kl", None), ("top1", 4), ("largest", 1))
        more = (("from_model", None), ("explained", None), ("unexplained", None))
        cells = [shown(check.get(key), digits) for key, digits in keys + more]
        rows.append([form, shown(megabytes, 1), *cells])
    return Table(
        caption=f"Packages, and their logits against the snapped model in float32{name}",
        head=[
            *("package", "MB", "tokens", "KL, nats", "top-1", "largest logit"),
            *("largest difference", "… FP16 constants explain", "… left over"),
        ],
        rows=rows,
    )


def _audit(audit: dict[str, Any], name: str) -> Fold:
    megabytes, operations = audit["megabytes"], audit["operations"]
    rows: list[list[str | Markup]] = [
        ["quantized layers, LUT and indices bit for bit the model's", shown(audit["layers"])],
        ["dense weights, bit for bit the model's", shown(audit["dense"])],
        ["bits per quantized weight, LUTs and scales counted", shown(audit["bits_per_weight"], 3)],
        *([f"megabytes: {what}", shown(size, 1)] for what, size in megabytes.items()),
        *([f"operations: {what}", shown(count)] for what, count in operations.items()),
    ]
    table = Table(caption=f"Audit of the Core ML package{name}", head=["what", "found"], rows=rows)
    return Fold(summary=f"Audit of the Core ML package{name}", parts=[table])
