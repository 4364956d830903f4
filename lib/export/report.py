"""What an export made and how it was checked: report.json, report.md, metrics.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.base.files import write_json, write_text
from lib.base.numbers import finite
from lib.export.audit import Audit
from lib.export.gate import LogitCheck

STATEMENT = (
    "Read and computed on this machine without Core ML; not run on an ANE. On a Mac: "
    "`lutqat mac-check runs/export/packages/coreml`."
)


@dataclass(kw_only=True)
class ExportReport:
    """Everything about one run of the stage.

    Attributes:
        fp16_megabytes: 10^6 bytes of the model with every weight in FP16, for comparison.
        folders: 10^6 bytes of each format's folder.
        coreai: what its CPU runtime gave, where it is installed.
    """

    target: str
    alpha: float
    fp16_megabytes: float
    folders: dict[str, float] = field(default_factory=dict)
    audit: Audit | None = None
    logits: LogitCheck | None = None
    coreai: dict[str, Any] | None = None

    @property
    def faults(self) -> list[str]:
        """All faults, one line each."""
        found = [] if self.audit is None else list(self.audit.faults)
        found += [] if self.logits is None else self.logits.faults
        return found + list((self.coreai or {}).get("faults", []))


def to_json(report: ExportReport) -> dict[str, Any]:
    """The report in plain values."""
    values = {"passed": not report.faults, "statement": STATEMENT, **asdict(report)}
    return {**values, "faults": report.faults}


def metrics(report: ExportReport) -> dict[str, Any]:
    """Few named numbers."""
    values: dict[str, Any] = {"passed": not report.faults}
    if report.audit is not None:
        values["coreml_mb"] = report.audit.megabytes.get("total")
        values["layers_exact"] = report.audit.layers
    if report.logits is not None:
        values["kl"] = finite(report.logits.kl)
        values["top1"] = report.logits.top1
    return {"export": values}


def to_markdown(report: ExportReport) -> str:
    """A page: verdict, sizes, audit, logits."""
    lines = [f"# Export: {'FAILED' if report.faults else 'passed'}", "", STATEMENT, ""]
    lines += [f"* {fault}" for fault in report.faults]
    lines += ["", "| what | 10^6 bytes |", "| --- | --- |"]
    lines.append(f"| the model with every weight in FP16 | {report.fp16_megabytes:.1f} |")
    lines += [f"| {name} | {size:.1f} |" for name, size in report.folders.items()]
    if report.audit is not None:
        lines += _audit_lines(report.audit, report.target)
    if report.logits is not None:
        lines += _logit_lines(report.logits)
    if report.coreai is not None:
        lines += ["", "## Core AI, executed on its CPU runtime", ""]
        lines += [f"* {name}: {value}" for name, value in report.coreai.items() if name != "faults"]
    return "\n".join(lines) + "\n"


def _audit_lines(audit: Audit, target: str) -> list[str]:
    sizes = audit.megabytes
    lines = ["", f"## Core ML package ({target}), read by an independent reader", ""]
    lines.append(f"* {audit.layers} quantized layers, LUT and indices bit for bit the model's")
    if audit.bits_per_weight is not None:
        lines.append(
            f"* quantized layers {sizes['layers']:.1f} MB ({audit.bits_per_weight:.2f} bits per "
            f"weight, LUTs and scales counted), embeddings and head {sizes['embeddings']:.1f} MB, "
            f"package {sizes['total']:.1f} MB"
        )
    kinds = ", ".join(f"{count} {kind}" for kind, count in audit.operations.items())
    return [*lines, f"* operations: {kinds}"]


def _logit_lines(check: LogitCheck) -> list[str]:
    return [
        "",
        f"## Its logits on {check.tokens} held-out tokens",
        "",
        "| against | largest difference |",
        "| --- | --- |",
        f"| the static graph (same constants) | {check.from_graph:.2g} |",
        f"| the snapped model in float32 | {check.from_model:.2g} |",
        f"| of which FP16 constants explain | {check.explained:.2g} |",
        "",
        f"Largest logit {check.largest:.1f}; KL {check.kl:.2g} nats per token, top-1 "
        f"{check.top1:.4f}.",
    ]


def write_report(report: ExportReport, out: Path) -> None:
    """Write report.json, report.md and metrics.json into ``out``."""
    write_json(out / "report.json", to_json(report))
    write_text(out / "report.md", to_markdown(report))
    write_json(out / "metrics.json", metrics(report))
