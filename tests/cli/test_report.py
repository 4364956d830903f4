"""report: where it writes, and what it refuses. (What it writes: tests/report.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import lutqat
from tests.report.runs import Page, write_runs


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_runs(tmp_path)


def test_the_page_is_written_whole(root: Path) -> None:
    outcome = lutqat("report")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "wrote runs/report.html\n"
    text = (root / "runs/report.html").read_text(encoding="utf-8")
    assert "1.234567" in Page(text).exact()
    lutqat("report", "--out", "a/b.html")
    assert (root / "a/b.html").read_text(encoding="utf-8") == text
    assert [path.name for path in (root / "a").iterdir()] == ["b.html"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("params.yaml", "no HTML file"),
        ("runs/scales/log.csv", "no HTML file"),
        ("folder.html", "is a folder"),
        ("runs/scales/model/x.html", "which DVC keeps"),
    ],
)
def test_what_is_not_overwritten(root: Path, out: str, words: str) -> None:
    (root / "folder.html").mkdir()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    lutqat("report", "--out", out).refused_with(3, words)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lutqat("report").refused_with(3, "run from the root of the repository")
    (tmp_path / "dvc.yaml").write_text("stages:\n  scales:\n    cmd: x\n")
    lutqat("report").refused_with(3, "`dvc repro` runs the pipeline")
    assert not (tmp_path / "runs").exists()
