"""What an export made and how it was checked: report.json, report.md, metrics.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.base.files import write_json, write_text
from lib.base.numbers import finite
from lib.export.audit import Audit
from lib.export.gate import LogitCheck

NOT_RUN = "Nothing was run by Core ML or on an ANE."
CHECKS = {
    "coreml": "read back by an independent reader and interpreted in float32",
    "coreai": "executed by Core AI's CPU runtime, in FP16",
    "huggingface": "loaded again and run in float32",
}
"""How each format is checked; the others are not."""


@dataclass(kw_only=True)
class ExportReport:
    """Everything about one run of the stage.

    Attributes:
        alpha: factor of the residual stream, the FP16 check's remedy.
        norm_checked: form of the norms that the FP16 check judged; packages have the prescaled one.
        fp16_megabytes: 10^6 bytes of the model with every weight in FP16, for comparison.
        folders: 10^6 bytes of each format's folder.
        audit: of the Core ML package.
        logits: of each format that was run.
        anemll: version of that checkpoint, and why not V1.
    """

    target: str
    alpha: float
    norm_checked: str
    fp16_megabytes: float
    folders: dict[str, float] = field(default_factory=dict)
    audit: Audit | None = None
    logits: dict[str, LogitCheck] = field(default_factory=dict)
    anemll: dict[str, Any] | None = None

    @property
    def faults(self) -> list[str]:
        """All faults, one line each."""
        found = [] if self.audit is None else list(self.audit.faults)
        return found + [fault for check in self.logits.values() for fault in check.faults]

    @property
    def passed(self) -> bool | None:
        """None where nothing was checked."""
        return not self.faults if self.logits else None


def to_json(report: ExportReport) -> dict[str, Any]:
    """The report in plain values; NaN and infinity become null."""
    values = {
        "passed": report.passed,
        "statement": NOT_RUN,
        "faults": report.faults,
        **asdict(report),
    }
    plain = _plain(values)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def metrics(report: ExportReport) -> dict[str, Any]:
    """Few named numbers."""
    values: dict[str, Any] = {"passed": report.passed}
    if report.audit is not None:
        values["coreml_mb"] = report.audit.megabytes["total"]
        values["layers_exact"] = report.audit.layers
    for name, check in report.logits.items():
        values[f"kl_{name}"] = finite(check.kl)
        values[f"top1_{name}"] = check.top1
    return {"export": values}


def to_markdown(report: ExportReport) -> str:
    """A page: verdict, sizes, audit, logits."""
    verdict = {True: "passed", False: "FAILED", None: "written, nothing checked"}[report.passed]
    lines = [f"# Export: {verdict}", "", NOT_RUN, ""]
    lines += [f"* {fault}" for fault in report.faults]
    lines += ["", "| what | 10^6 bytes | checked |", "| --- | --- | --- |"]
    lines.append(f"| the model with every weight in FP16 | {report.fp16_megabytes:.1f} | |")
    lines += [
        f"| {name} | {size:.1f} | {CHECKS.get(name, 'no')} |"
        for name, size in report.folders.items()
    ]
    if report.alpha != 1:
        lines += ["", f"The packages' residual stream is scaled by {report.alpha:g}."]
    if report.norm_checked != "prescaled":
        lines += [
            "",
            f"The FP16 check judged {report.norm_checked} norms; packages have prescaled.",
        ]
    if report.anemll is not None:
        why = report.anemll["not_v1"]
        lines += [
            "",
            f"ANEMLL checkpoint: {report.anemll['version']}" + (f" ({why})" if why else ""),
        ]
    if report.audit is not None:
        lines += _audit_lines(report.audit, report.target)
    if report.logits:
        lines += _logit_lines(report.logits)
    return "\n".join(lines) + "\n"


def _audit_lines(audit: Audit, target: str) -> list[str]:
    sizes = audit.megabytes
    lines = ["", f"## Core ML package ({target})", ""]
    if audit.bits_per_weight is not None:
        lines.append(f"* {audit.layers} quantized layers, LUT and indices bit for bit the model's")
        lines.append(
            f"* they take {sizes['layers']:.1f} MB ({audit.bits_per_weight:.2f} bits per weight, "
            "LUTs and scales counted)"
        )
    lines.append(f"* {audit.dense} dense weights, bit for bit the model's")
    lines.append(
        f"* embeddings and head {sizes['embeddings']:.1f} MB, package {sizes['total']:.1f} MB"
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in audit.operations.items())
    return [*lines, f"* operations: {kinds}"]


def _logit_lines(checks: dict[str, LogitCheck]) -> list[str]:
    lines = ["", "## Logits on held-out tokens, against the snapped model in float32", ""]
    columns = ["export", "tokens", "KL", "top-1", "largest logit", "largest difference"]
    columns += ["FP16 constants explain", "left over"]
    lines += [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for name, c in checks.items():
        explained = ["", ""]
        if c.explained is not None and c.unexplained is not None:
            explained = [f"{c.explained:.2g}", f"{c.unexplained:.2g}"]
        cells = [name, str(c.tokens), f"{c.kl:.2g}", f"{c.top1:.4f}", f"{c.largest:.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{c.from_model:.2g}', *explained])} |")
    return lines


def write_report(report: ExportReport, out: Path) -> None:
    """Write report.json, report.md and metrics.json into ``out``."""
    write_json(out / "report.json", to_json(report))
    write_text(out / "report.md", to_markdown(report))
    write_json(out / "metrics.json", metrics(report))
