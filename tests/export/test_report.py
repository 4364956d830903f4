"""The report says what was found, and fails where there is a fault."""

from __future__ import annotations

import json
from pathlib import Path

from lib.export.audit import Audit
from lib.export.gate import LogitCheck
from lib.export.report import ExportReport, metrics, to_json, to_markdown, write_report


def _report(**changes: list[str]) -> ExportReport:
    audit = Audit(
        layers=14,
        operations={"conv": 15},
        megabytes={"layers": 1.5, "embeddings": 2.5, "total": 4.5},
        bits_per_weight=3.25,
        faults=changes.get("audit", []),
    )
    logits = LogitCheck(
        tokens=11,
        largest=9.5,
        from_graph=1e-5,
        from_model=2e-3,
        explained=2e-3,
        kl=1e-6,
        top1=1.0,
        faults=changes.get("logits", []),
    )
    return ExportReport(
        target="iOS18",
        alpha=1.0,
        fp16_megabytes=20.0,
        folders={"coreml": 4.6},
        audit=audit,
        logits=logits,
    )


def test_a_passed_export() -> None:
    report = _report()
    assert report.faults == []
    assert metrics(report)["export"] == {
        "passed": True,
        "coreml_mb": 4.5,
        "layers_exact": 14,
        "kl": 1e-6,
        "top1": 1.0,
    }
    page = to_markdown(report)
    assert page.startswith("# Export: passed") and "not run on an ANE" in page
    assert "3.25 bits per weight" in page and "| coreml | 4.6 |" in page


def test_faults_of_any_part_fail_it() -> None:
    report = _report(audit=["layer x differs"], logits=["KL is large"])
    assert report.faults == ["layer x differs", "KL is large"]
    assert not metrics(report)["export"]["passed"]
    assert "# Export: FAILED" in to_markdown(report) and "* layer x differs" in to_markdown(report)


def test_formats_without_a_package_have_no_audit() -> None:
    report = ExportReport(target="iOS18", alpha=1.0, fp16_megabytes=20.0, folders={"anemll": 3.0})
    assert report.faults == []
    assert "operations" not in to_markdown(report) and "layers_exact" not in str(metrics(report))


def test_core_ais_faults_count() -> None:
    report = _report()
    report.coreai = {"top1": 0.5, "faults": ["Core AI: top-1 agreement 0.500 is below 0.95"]}
    assert len(report.faults) == 1 and "* top1: 0.5" in to_markdown(report)


def test_it_is_written_as_three_files(tmp_path: Path) -> None:
    report = _report()
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == to_json(report)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics(report)
    assert (tmp_path / "report.md").read_text() == to_markdown(report)
