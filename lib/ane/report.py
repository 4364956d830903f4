"""The gate's outputs: report.json, report.md, headroom.svg, deploy.json, the stage's metrics."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.ane.check import Applied, CheckResult
from lib.ane.emulate import OpRecord
from lib.ane.figure import draw_headroom
from lib.ane.forms import FormResult, Forms
from lib.ane.headroom import headroom, matmul_headroom, worst_record
from lib.ane.page import PACKAGE, STATEMENT, to_markdown
from lib.ane.products import Mode
from lib.base.figures import write_svg
from lib.base.files import write_json, write_text
from lib.base.numbers import finite
from lib.quant.fp16 import FP16_MAX_SQUARABLE


def metrics(result: CheckResult) -> dict[str, Any]:
    """Few named numbers; a form or mode that was not run is left out."""
    values: dict[str, Any] = {"passed": result.passed, "alpha": result.alpha}
    for form, modes in result.forms.items():
        for mode, values_of in modes.items():
            end = form if mode is Mode.WIDE else f"{form}_{mode}"
            values[f"kl_{end}"] = finite(values_of.kl)
            values[f"top1_{end}"] = values_of.top1
    values["worst_headroom"] = headroom(worst_record(result))
    values["failures"] = len(result.failures)
    values["warnings"] = len(result.warnings)
    return {"ane_check": values}


def to_json(result: CheckResult) -> dict[str, Any]:
    """The whole result in plain values, a key per section; NaN and infinity become null."""
    spec = asdict(result.spec)
    return {
        "passed": result.passed,
        "alpha": result.alpha,
        "spec": {**spec, "modes": [str(mode) for mode in result.spec.modes]},
        "failures": [asdict(failure) for failure in result.failures],
        "warnings": result.warnings,
        "remedy": None if result.remedy is None else _remedy(result.remedy),
        "constants": asdict(result.constants),
        "headroom": {
            "operations": {
                form: _operations(modes[Mode.WIDE].records) for form, modes in result.forms.items()
            },
            "norms": {
                name: {
                    "max_abs_input": finite(peak),
                    "plain_norm_overflows": peak > FP16_MAX_SQUARABLE,
                }
                for name, peak in result.norm_peaks.items()
            },
        },
        "against_float32": {
            "tokens": result.tokens,
            "perplexity": finite(result.reference_perplexity),
            "forms": _comparisons(result.forms),
        },
        "graph": [asdict(fact) for fact in result.facts],
        "package": PACKAGE,
        "ane": STATEMENT,
    }


def _remedy(applied: Applied) -> dict[str, Any]:
    return {
        "alpha": applied.alpha,
        "note": applied.note,
        "before": [asdict(failure) for failure in applied.before],
        "after": [asdict(failure) for failure in applied.after],
        "against_float32_before": _comparisons(applied.unscaled),
    }


def _comparisons(forms: Forms) -> dict[str, Any]:
    return {
        form: {str(mode): _comparison(values) for mode, values in modes.items()}
        for form, modes in forms.items()
    }


def _operations(records: list[OpRecord]) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for record in records:
        values = {
            "max_abs": record.max_abs,
            "headroom": headroom(record),
            "overflows": record.overflows,
        }
        if record.is_matmul:
            values["matmul_headroom"] = matmul_headroom(record)
        layers.setdefault(record.module or "(model)", {})[record.op] = values
    return layers


def _comparison(result: FormResult) -> dict[str, Any]:
    return {
        "tokens": result.tokens,
        "kl": finite(result.kl),
        "top1": result.top1,
        "perplexity": finite(result.perplexity),
        "float32_perplexity": finite(result.reference_perplexity),
        "non_finite_logits": result.non_finite_logits,
        "non_finite_from": result.non_finite_from,
        "same_as": result.same_as,
        "relative_errors": {name: finite(error) for name, error in result.errors.items()},
    }


def to_deploy(result: CheckResult) -> dict[str, Any]:
    """What an export has to repeat so that it is the model that was judged: the factor of the
    residual stream, and the form of the norms."""
    return {"alpha": result.alpha, "norm": str(result.spec.norm)}


def write_report(result: CheckResult, folder: Path) -> None:
    """Write report.json, report.md, headroom.svg, deploy.json and metrics.json into ``folder``.

    deploy.json is apart from the report, so that only a change of what is deployed exports again.
    """
    write_json(folder / "report.json", to_json(result))
    write_text(folder / "report.md", to_markdown(result))
    write_svg(folder / "headroom.svg", draw_headroom(result))
    write_json(folder / "deploy.json", to_deploy(result))
    write_json(folder / "metrics.json", metrics(result))
