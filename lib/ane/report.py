"""The gate's outputs: report.json, report.md, headroom.svg and the stage's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib.ane.check import CheckResult, FormResult
from lib.ane.emulate import MATMUL_LIMIT, OpRecord
from lib.base.figures import write_svg
from lib.base.files import write_json, write_text
from lib.base.numbers import finite
from lib.quant.fp16 import FP16_MAX, FP16_MAX_SQUARABLE

STATEMENT = (
    "Emulated in FP16 on this machine; not run on an ANE. Accumulation is assumed wide, with one "
    "rounding per operation."
)
WORST_SHOWN = 8
WARNINGS_SHOWN = 5


def headroom(record: OpRecord) -> float:
    """How many times larger the operation's results could be and still be finite."""
    return FP16_MAX / max(record.max_abs, 2.0**-24)


def worst_records(result: CheckResult, form: str) -> list[OpRecord]:
    """Each module's largest operation, largest first; norms are reported by their inputs."""
    worst: dict[str, OpRecord] = {}
    for record in result.forms[form].records:
        known = worst.get(record.module)
        if record.module not in result.norm_peaks and (
            known is None or record.max_abs > known.max_abs
        ):
            worst[record.module] = record
    return sorted(worst.values(), key=lambda record: -record.max_abs)


def metrics(result: CheckResult) -> dict[str, Any]:
    """Few named numbers; a form that a checkpoint does not have is left out."""
    worst = max(
        (records[0] for form in result.forms if (records := worst_records(result, form))),
        key=lambda record: record.max_abs,
    )
    values: dict[str, Any] = {"passed": result.passed}
    for form, form_result in result.forms.items():
        values[f"kl_{form}"] = finite(form_result.kl)
        values[f"top1_{form}"] = form_result.top1
    values["worst_headroom"] = headroom(worst)
    values["failures"] = len(result.failures)
    values["warnings"] = len(result.warnings)
    return {"ane_check": values}


def to_json(result: CheckResult) -> dict[str, Any]:
    """The whole result in plain values; NaN and infinity become null."""
    return {
        "passed": result.passed,
        "statement": STATEMENT,
        "limits": asdict(result.limits),
        "tokens": result.tokens,
        "reference_perplexity": finite(result.reference_perplexity),
        "failures": [asdict(failure) for failure in result.failures],
        "warnings": result.warnings,
        "constants": asdict(result.constants),
        "forms": {name: _form_json(form) for name, form in result.forms.items()},
        "norms": {
            name: {
                "max_abs_input": finite(peak),
                "plain_norm_overflows": not peak <= FP16_MAX_SQUARABLE,
            }
            for name, peak in result.norm_peaks.items()
        },
    }


def _form_json(form: FormResult) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for record in form.records:
        operations = layers.setdefault(record.module or "(model)", {})
        operations[record.op] = {
            "max_abs": record.max_abs,
            "headroom": headroom(record),
            "overflows": record.overflows,
        }
        if record.is_matmul:
            operations[record.op]["matmul_headroom"] = headroom(record) * MATMUL_LIMIT / FP16_MAX
    return {
        "kl": finite(form.kl),
        "top1": form.top1,
        "perplexity": finite(form.perplexity),
        "non_finite_logits": form.non_finite_logits,
        "non_finite_from": form.non_finite_from,
        "relative_errors": {name: finite(error) for name, error in form.errors.items()},
        "operations": layers,
    }


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def to_markdown(result: CheckResult) -> str:
    """A page: verdict, forms against float32, worst layers, warnings."""
    lines = [f"# FP16 check: {'passed' if result.passed else 'FAILED'}", "", STATEMENT, ""]
    lines += [f"* {failure}" for failure in result.failures]
    lines += ["", f"{result.tokens} held-out tokens; limits: KL {result.limits.max_kl:g}, "]
    lines[-1] += f"top-1 {result.limits.min_top1:g}. {result.constants.layers} quantized layers."
    lines += ["", "## Against float32", ""]
    rows = [["float32", "", "", f"{result.reference_perplexity:.4f}", ""]]
    rows += [
        [name, f"{f.kl:.3g}", f"{f.top1:.4f}", f"{f.perplexity:.4f}", str(f.non_finite_logits)]
        for name, f in result.forms.items()
    ]
    lines += _table(["form", "KL", "top-1", "perplexity", "non-finite logits"], rows)
    for form in result.forms:
        lines += ["", f"## Least headroom, {form} form", ""]
        rows = [
            [r.module or "(model)", r.op, f"{r.max_abs:.0f}", f"{headroom(r):.1f}"]
            for r in worst_records(result, form)[:WORST_SHOWN]
        ]
        lines += _table(["layer", "operation", "max abs", "65504 / max"], rows)
    lines += ["", f"## Warnings: {len(result.warnings)}", ""]
    lines += [f"* {warning}" for warning in result.warnings[:WARNINGS_SHOWN]]
    if len(result.warnings) > WARNINGS_SHOWN:
        lines.append(f"* and {len(result.warnings) - WARNINGS_SHOWN} more in report.json")
    return "\n".join(lines) + "\n"


def draw_headroom(result: CheckResult) -> Figure:
    """max|x| of every module in the order of execution, with the limits as lines."""
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for form in result.forms:
        peaks: dict[str, float] = {}
        for record in result.forms[form].records:
            peaks[record.module] = max(peaks.get(record.module, 0.0), record.max_abs)
        axes.plot(list(peaks.values()), ".", markersize=4, label=form)
    limits = {
        "largest FP16": FP16_MAX,
        "matrix product, some devices": MATMUL_LIMIT,
        "plain x^2 norm": FP16_MAX_SQUARABLE,
    }
    for style, (name, limit) in zip(("-", "--", ":"), limits.items(), strict=True):
        axes.axhline(limit, linestyle=style, color="black", linewidth=0.8, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("module, in the order of execution")
    axes.set_ylabel("max |x|")
    axes.set_title("FP16 headroom (emulated, not run on an ANE)")
    axes.legend(fontsize="small")
    return figure


def write_report(result: CheckResult, folder: Path) -> None:
    """Write report.json, report.md, headroom.svg and metrics.json into ``folder``."""
    write_json(folder / "report.json", to_json(result))
    write_text(folder / "report.md", to_markdown(result))
    write_svg(folder / "headroom.svg", draw_headroom(result))
    write_json(folder / "metrics.json", metrics(result))
