"""report.md: verdict, then the six sections of the FP16 check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lib.ane.check import CheckResult
from lib.ane.emulate import OpRecord
from lib.ane.forms import FormResult, Forms
from lib.ane.headroom import headroom, matmul_headroom, worst_products, worst_records
from lib.ane.products import MATMUL_LIMIT, Mode
from lib.quant.fp16 import FP16_MAX, FP16_MAX_SQUARABLE

STATEMENT = (
    "Emulated in FP16 on this machine; not run on an ANE. On a Mac, `lutqat mac-check PACKAGE` "
    "says which operations the Neural Engine takes and compares its output."
)
PACKAGE = (
    "A package is audited where it is made: stage `export`, runs/export/report.md (each layer one "
    "exact constant, nothing dense or twice, no FP32 operation, bits per weight)."
)
MODES = {
    Mode.WIDE: "products accumulated in float32, one rounding",
    Mode.BOUNDED: f"the same, a product above {MATMUL_LIMIT:.0f} is infinite",
    Mode.PARTIAL: "products summed in FP16; pessimistic, warns only",
}
WORST_SHOWN = 8
LINES_SHOWN = 8


def to_markdown(result: CheckResult) -> str:
    """The page: what failed, what was done about it, and what was found."""
    lines = [f"# FP16 check: {'passed' if result.passed else 'FAILED'}", "", STATEMENT, ""]
    limits = result.spec.limits
    lines += [
        f"{result.tokens} held-out tokens, norms {result.spec.norm}, residual stream times "
        f"{result.alpha:g}. Limits in modes wide and bounded: KL {limits.max_kl:g}, top-1 "
        f"{limits.min_top1:g}, nothing infinite.",
    ]
    if result.failures:
        lines += ["", f"## Failures: {len(result.failures)}", "", *_shown(result.failures)]
    lines += _remedy(result)
    lines += ["", f"## Warnings: {len(result.warnings)}", "", *_shown(result.warnings)]
    lines += _constants(result) + _headroom(result) + _against_float32(result)
    lines += ["", "## 4. Graph facts", ""]
    lines += _table(
        ["fact", "status", "found"], [[f.name, str(f.status), f.found] for f in result.facts]
    )
    lines += ["", "## 5. Package", "", PACKAGE, "", "## 6. Not run on an ANE", "", STATEMENT]
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _shown(items: Sequence[object]) -> list[str]:
    lines = [f"* {item}" for item in items[:LINES_SHOWN]]
    if len(items) > LINES_SHOWN:
        lines.append(f"* and {len(items) - LINES_SHOWN} more in report.json")
    return lines


def _remedy(result: CheckResult) -> list[str]:
    applied = result.remedy
    if applied is None:
        return []
    lines = ["", f"## Remedy: alpha {applied.alpha:g}", ""]
    if applied.alpha == 1:
        return [*lines, f"Not applied: {applied.note}."]
    lines.append(
        f"Without it {len(applied.before)} limits were broken, with it {len(applied.after)}; what "
        f"follows is with it. {applied.note}."
    )
    lines += ["", "Without it:", "", *_shown(applied.before), ""]
    return lines + _comparisons(applied.unscaled)


def _constants(result: CheckResult) -> list[str]:
    found = result.constants
    text = (
        f"{found.layers} quantized layers, {found.entries} LUT and scale entries: "
        f"{len(found.faults)} layers with entries that are not finite, exact and distinct in FP16; "
        f"{found.subnormal} entries are subnormal."
    )
    return ["", "## 1. Constants", "", text]


def _headroom(result: CheckResult) -> list[str]:
    lines = ["", "## 2. Headroom per operation", ""]
    large = [name for name, peak in result.norm_peaks.items() if peak > FP16_MAX_SQUARABLE]
    if result.norm_peaks:
        worst = max(result.norm_peaks, key=lambda name: result.norm_peaks[name])
        lines += [
            f"Norm inputs: largest {result.norm_peaks[worst]:.6g} ({worst}); {len(large)} of "
            f"{len(result.norm_peaks)} pass {FP16_MAX_SQUARABLE:.1f}, above which a plain x^2 norm "
            f"overflows. Deployed: {result.spec.norm}.",
        ]
    header = ["layer", "operation", "max abs", f"{FP16_MAX:.0f} / max", f"{MATMUL_LIMIT:.0f} / max"]
    for form in result.forms:
        lines += ["", f"### {form.capitalize()} form", ""]
        rows = [[*_record(r), ""] for r in worst_records(result, form)[:WORST_SHOWN]]
        for record in worst_products(result, form)[: WORST_SHOWN // 2]:
            rows.append([*_record(record), f"{matmul_headroom(record):.1f}"])
        lines += _table(header, rows)
    return lines


def _record(record: OpRecord) -> list[str]:
    name = record.module or "(model)"
    return [name, record.op, f"{record.max_abs:.0f}", f"{headroom(record):.1f}"]


def _comparisons(forms: Forms) -> list[str]:
    header = ["form", "mode", "tokens", "KL", "top-1", "perplexity", "float32", "non-finite logits"]
    rows = [
        [form, str(mode), *_comparison(values)]
        for form, modes in forms.items()
        for mode, values in modes.items()
    ]
    return _table(header, rows)


def _comparison(result: FormResult) -> list[str]:
    return [
        str(result.tokens),
        f"{result.kl:.3g}",
        f"{result.top1:.4f}",
        f"{result.perplexity:.4f}",
        f"{result.reference_perplexity:.4f}",
        str(result.non_finite_logits),
    ]


def _against_float32(result: CheckResult) -> list[str]:
    lines = ["", "## 3. Against float32", ""]
    lines += _comparisons(result.forms)
    lines += ["", *(f"* {mode}: {MODES[mode]}" for mode in result.spec.modes)]
    same = [
        form
        for form, modes in result.forms.items()
        if Mode.BOUNDED in modes and modes[Mode.BOUNDED].same_as is not None
    ]
    if same:
        lines.append(
            f"* bounded was not run again for {' and '.join(same)}: no product passes "
            f"{MATMUL_LIMIT:.0f}, so it is wide, bit for bit"
        )
    return lines
