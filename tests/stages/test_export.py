"""The stage: what it writes, what its gate does, and bad input in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from lib.base.errors import GateError, InputError, LutqatError, ParamsError
from lib.model.checkpoint import save_checkpoint
from lib.model.load import load_causal_lm
from lib.model.surgery import quantize_model
from lib.snap.snap import snap_model
from tests import bad_input as bad
from tests.tiny_models import model_spec

OUT = Path("runs/export")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, a snapped model and its FP16 check."""
    folder = tmp_path_factory.mktemp("project")
    bad.make_project(folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        for stage in ("teacher", "tokens"):
            bad.run_stage(stage)
        teacher = Path("data/teacher")
        model = load_causal_lm(teacher)
        quantize_model(model, model_spec())
        snap_model(model, baked=False)
        save_checkpoint(model, Path("runs/snap/model"), tokenizer_from=teacher, info={}, half=True)
        bad.run_stage("ane_check")
    return folder


@pytest.fixture(autouse=True)
def _there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(project)


def _run(**changes: Any) -> None:
    values = {"formats": ["coreml"], "context": 64, "prefill_tokens": 16, "max_kl": 0.01, **changes}
    bad.params(**{f"export__{key}": value for key, value in values.items()})()
    bad.run_stage("export")


def test_every_format_and_the_report() -> None:
    _run(formats=["coreml", "huggingface", "anemll"])
    assert {p.name for p in (OUT / "packages").iterdir()} == {"coreml", "huggingface", "anemll"}
    assert (OUT / "packages/huggingface/model.safetensors").is_file()
    assert (OUT / "packages/anemll/model_state_dict.pt").is_file()
    metrics = json.loads((OUT / "metrics.json").read_text())["export"]
    assert metrics["passed"] is True and metrics["layers_exact"] == 14
    assert "# Export: passed" in (OUT / "report.md").read_text()


def test_a_broken_limit_stops_with_the_report_written(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run(max_kl=1e-12)
    assert stopped.value.code == GateError.exit_code
    line = capfd.readouterr().err.splitlines()[-1]
    assert "KL" in line and "export.max_kl 1e-12" in line and "runs/export/report.md" in line
    assert json.loads((OUT / "metrics.json").read_text())["export"]["passed"] is False


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"context": 100_000}, InputError, "export.context 100000 is beyond the model's"),
        ({"prefill_tokens": 60}, InputError, "no validation text has the 63 tokens"),
        ({"context": 18}, ParamsError, "export.context = 18: must be at least 19"),
        pytest.param(
            {"formats": ["coreai"]},
            InputError,
            "coreai",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("coreai") is not None, reason="the extra is installed"
            ),
        ),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    error: type[LutqatError],
    words: str,
) -> None:
    _run()
    before = {path: path.stat().st_mtime_ns for path in (OUT / "packages").rglob("*")}
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        _run(**changes)
    assert stopped.value.code == error.exit_code
    printed = capfd.readouterr().err
    assert words in printed.splitlines()[-1] and "Traceback" not in printed
    assert {path: path.stat().st_mtime_ns for path in (OUT / "packages").rglob("*")} == before
