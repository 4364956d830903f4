"""export: Core ML package, Hugging Face folder, ANEMLL checkpoint, each checked.

Usage: python -m stages.export MODEL TOKENS CHECK OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.device import set_threads
from lib.base.errors import GateError
from lib.base.stage import run_stage
from lib.export.report import write_report
from lib.export.run import export_model
from lib.params.load import stage_params
from lib.text.sequences import TokenSet


def main(checkpoint: Path, tokens: Path, check: Path, out: Path) -> None:
    """Export the snapped model; the report is written whatever it says."""
    params = stage_params("export")
    set_threads(params.run.threads)
    texts = TokenSet(tokens / "val")
    rows = [
        [int(i) for i in ids[:length]]
        for ids, length in zip(texts.input_ids, texts.lengths, strict=True)
    ]
    report = export_model(checkpoint, check, rows, out / "packages", params.export)
    write_report(report, out)
    if report.faults:
        more = f" (and {len(report.faults) - 1} more)" if len(report.faults) > 1 else ""
        raise GateError(f"export: {report.faults[0]}{more}; see {out / 'report.md'}")


if __name__ == "__main__":
    run_stage(main)
