"""The stage: what a broken limit does to the pipeline, and what is written whatever it says."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from lib.base.errors import GateError
from lib.model.checkpoint import save_checkpoint
from tests import bad_input as bad
from tests.ane.tiny import with_large_residual

OUT = Path("runs/ane_check")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, and a snapped model whose residual stream passes 255."""
    folder = tmp_path_factory.mktemp("project")
    bad.make_project(folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        for stage in ("teacher", "tokens"):
            bad.run_stage(stage)
        model, teacher = with_large_residual(), Path("data/teacher")
        save_checkpoint(model, Path("runs/snap/model"), tokenizer_from=teacher, info={}, half=True)
    return folder


@pytest.fixture(autouse=True)
def _there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(project)


def _metrics() -> dict[str, object]:
    values: dict[str, object] = json.loads((OUT / "metrics.json").read_text())["ane_check"]
    report = json.loads((OUT / "report.json").read_text())
    assert report["alpha"] == values["alpha"]
    assert report["passed"] is values["passed"]
    assert "FP16 check" in (OUT / "report.md").read_text()
    assert (OUT / "headroom.svg").read_text().startswith("<?xml")
    return values


def test_plain_norms_stop_the_pipeline(capfd: pytest.CaptureFixture[str]) -> None:
    bad.params(ane_check__norm="plain", ane_check__remedy="none", ane_check__gate="fail")()
    with pytest.raises(SystemExit) as stopped:
        bad.run_stage("ane_check")
    assert stopped.value.code == GateError.exit_code
    line = capfd.readouterr().err.splitlines()[-1]
    for words in ("layernorm", "largest |input|", "norm: prescaled", "remedy: alpha", "gate=warn"):
        assert words in line
    assert _metrics()["passed"] is False


def test_gate_warn_only_reports() -> None:
    bad.params(ane_check__norm="plain", ane_check__remedy="none", ane_check__gate="warn")()
    bad.run_stage("ane_check")
    assert _metrics()["passed"] is False


@pytest.mark.parametrize(("norm", "remedy"), [("plain", "alpha"), ("prescaled", "none")])
def test_either_remedy_lets_it_pass(norm: str, remedy: str) -> None:
    bad.params(ane_check__norm=norm, ane_check__remedy=remedy, ane_check__gate="fail")()
    bad.run_stage("ane_check")
    values = _metrics()
    assert values["passed"] is True
    assert (values["alpha"] == 1) is (remedy == "none")
