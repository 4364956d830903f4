"""The stage evaluate as DVC runs it, where it cannot begin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lib.base.errors import InputError, LutqatError, ParamsError
from tests import bad_input as bad


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ("mmlu", ParamsError, ['evaluate.tasks.0 = "mmlu"', "package:piqa"]),
        ("package:piqa", InputError, ["evaluate.tasks", "pip install", "requirements-tasks.txt"]),
    ],
)
def test_a_task_that_cannot_be_measured_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    task: str,
    error: type[LutqatError],
    words: list[str],
) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    bad.make_project(tmp_path)
    for stage in ("teacher", "tokens"):
        bad.run_stage(stage)
    bad.params(evaluate__tasks=[task])()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        bad.run_stage("evaluate")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []
    assert stopped.value.code == error.exit_code
    assert not Path("data/packages").exists()
