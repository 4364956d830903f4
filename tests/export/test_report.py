"""The report says what was found, and fails where there is a fault."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lib.export.audit import Audit
from lib.export.gate import LogitCheck
from lib.export.report import ExportReport, metrics, to_json, to_markdown, write_report


def _logits(**changes: Any) -> LogitCheck:
    values: dict[str, Any] = {
        "tokens": 11,
        "largest": 9.5,
        "from_model": 2e-3,
        "explained": 2e-3,
        "unexplained": 1e-5,
        "kl": 1e-6,
        "top1": 1.0,
    }
    return LogitCheck(**{**values, **changes})


def _report(faults: list[str] | None = None, **checks: LogitCheck) -> ExportReport:
    audit = Audit(
        layers=14,
        dense=1,
        operations={"conv": 15},
        megabytes={"layers": 1.5, "embeddings": 2.5, "total": 4.5},
        bits_per_weight=3.25,
        faults=faults or [],
    )
    return ExportReport(
        target="iOS18",
        alpha=1.0,
        norm_checked="prescaled",
        fp16_megabytes=20.0,
        folders={"coreml": 4.6},
        audit=audit,
        logits=checks or {"coreml": _logits()},
    )


def test_a_passed_export() -> None:
    report = _report()
    assert report.faults == []
    assert metrics(report)["export"] == {
        "passed": True,
        "coreml_mb": 4.5,
        "layers_exact": 14,
        "kl_coreml": 1e-6,
        "top1_coreml": 1.0,
    }
    page = to_markdown(report)
    assert page.startswith("# Export: passed") and "on an ANE" in page
    assert "3.25 bits per weight" in page and "| coreml | 4.6 | read back" in page
    assert "scaled by" not in page and "judged" not in page


def test_faults_of_any_part_fail_it() -> None:
    bad = {"coreml": _logits(faults=["KL is large"]), "coreai": _logits(faults=["other"])}
    report = _report(["layer x differs"], **bad)
    assert report.faults == ["layer x differs", "KL is large", "other"]
    assert metrics(report)["export"]["passed"] is False
    assert "# Export: FAILED" in to_markdown(report) and "* layer x differs" in to_markdown(report)


def test_nothing_checked_is_not_passed() -> None:
    report = ExportReport(
        target="iOS18",
        alpha=1.0,
        norm_checked="prescaled",
        fp16_megabytes=20.0,
        folders={"anemll": 3.0},
        anemll={"version": "v2", "layers": 14, "not_v1": "x has negative scales"},
    )
    assert report.faults == [] and metrics(report) == {"export": {"passed": None}}
    page = to_markdown(report)
    assert "nothing checked" in page and "| anemll | 3.0 | no |" in page
    assert "ANEMLL checkpoint: v2 (x has negative scales)" in page


def test_what_differs_from_the_check_is_said() -> None:
    report = _report()
    report.alpha, report.norm_checked = 0.25, "plain"
    page = to_markdown(report)
    assert "scaled by 0.25" in page and "judged plain norms" in page


def test_it_is_written_as_three_files_even_without_numbers(tmp_path: Path) -> None:
    broken = _logits(kl=math.nan, unexplained=math.inf, largest=math.nan, faults=["not finite"])
    report = _report(coreml=broken)
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == to_json(report)
    assert json.loads((tmp_path / "report.json").read_text())["logits"]["coreml"]["kl"] is None
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics(report)
    assert (tmp_path / "report.md").read_text() == to_markdown(report)
