"""The stage recover as DVC runs it: off without torch, on in the tiny project."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.base.errors import ParamsError
from lib.evaluate.ladder import Rung
from lib.model.adapter_files import has_adapter
from tests import bad_input as bad

FOLDERS = "none none none none runs/recover"


@pytest.fixture
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    bad.make_project(tmp_path)


@pytest.mark.usefixtures("_project")
def test_off_it_says_so_and_needs_neither_torch_nor_data() -> None:
    bad.params(recover__steps=0)()
    code = (
        f"import sys; sys.argv = ['recover', *{FOLDERS.split()}]\n"
        "import runpy; runpy.run_module('stages.recover', run_name='__main__')\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {"PYTHONPATH": str(bad.ROOT), "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    out = Path("runs/recover")
    assert json.loads((out / "metrics.json").read_text()) == {"recover": {"steps": 0}}
    assert json.loads((out / "adapter/recover.json").read_text())["trained"] is False
    assert not has_adapter(out / "adapter")
    with (out / "log.csv").open() as file:
        assert list(csv.DictReader(file)) == []


@pytest.mark.usefixtures("_project")
def test_on_it_trains_and_the_ladder_gains_a_rung(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in (*bad.BEFORE_TRAINING, "scales", "snap", "recover"):
        bad.run_stage(stage)
    metrics = json.loads(Path("runs/recover/metrics.json").read_text())["recover"]
    assert metrics["steps"] == 2 and metrics["best_kd"] < metrics["initial_kd"]
    assert has_adapter(Path("runs/recover/adapter"))

    rungs: list[Rung] = []
    monkeypatch.setattr("lib.evaluate.ladder.measure_ladder", lambda r, *_: rungs.extend(r))
    monkeypatch.setattr("lib.evaluate.report.write_ladder", lambda *_, **__: None)
    bad.run_stage("evaluate")
    assert [rung.name for rung in rungs][-2:] == ["snap", "+ adapter"]
    assert any(".lora_A." in name for name, _ in rungs[-1].load().named_parameters())

    bad.params(recover__steps=0)()
    bad.run_stage("recover")
    rungs.clear()
    bad.run_stage("evaluate")
    assert rungs[-1].name == "snap"

    capfd.readouterr()
    for changes, error, words in (
        ({"recover__rank": 65}, ParamsError, "rank 65"),
        ({"recover__mode": "kd", "recover__hard_top1_weight": 0.1}, ParamsError, "candidates"),
    ):
        bad.params(recover__steps=2, **changes)()
        with pytest.raises(SystemExit) as stopped:
            bad.run_stage("recover")
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line
        assert stopped.value.code == error.exit_code
