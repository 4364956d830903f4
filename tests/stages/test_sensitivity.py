"""The stage as DVC runs it: what it writes, and bad input in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.base.errors import InputError, LutqatError, MismatchError, NonFiniteError, ParamsError
from lib.model.scores import block_scores, read_scores
from tests import bad_input as bad

OUT = Path("runs/sensitivity")
GIVEN = "data/local/scores.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, tokens and cache of the tiny project, not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    bad.make_project(folder)
    (folder / GIVEN).parent.mkdir(parents=True)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        for stage in bad.BEFORE_TRAINING:
            bad.run_stage(stage)
    return folder


@pytest.fixture(autouse=True)
def _there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it as the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns(".ckpt"))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(folder)


def run(**section: Any) -> dict[str, float]:
    bad.params(**{f"sensitivity__{key}": value for key, value in section.items()})()
    bad.run_stage("sensitivity")
    return read_scores(OUT / "scores.json")


@pytest.mark.parametrize("method", ["fisher", "perturbation"])
def test_every_layer_is_scored(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    scores = run(method=method)
    assert len(scores) == 14 and all(value != 0 for value in scores.values())
    assert sorted(p.name for p in OUT.iterdir()) == ["metrics.json", "scores.json", "scores.svg"]
    blocks = block_scores(scores, 2)
    metrics = json.loads((OUT / "metrics.json").read_text())["sensitivity"]
    assert metrics["most_sensitive"] == blocks.index(max(blocks))
    assert (OUT / "scores.svg").read_text().startswith("<?xml")
    progress = "gradient batches: 4" if method == "fisher" else "measuring layers: 14"
    assert f"{progress} done" in capfd.readouterr().err


def test_a_file_is_taken() -> None:
    bad.replace(GIVEN, b'{"sensitivity_scores": [0.5, 2]}')()
    assert run(method="file", file=GIVEN) == {"model.layers.0": 0.5, "model.layers.1": 2.0}


def test_only_declared_data_is_needed() -> None:
    for name in ("data/tokens", "data/local"):
        shutil.rmtree(name)
    assert len(run()) == 14


def from_file(content: bytes | None) -> Callable[[], None]:
    """Set method file, and write what it reads."""
    section = bad.params(sensitivity__method="file", sensitivity__file=GIVEN)
    return section if content is None else bad.both(bad.replace(GIVEN, content), section)


CASES: dict[str, tuple[Callable[[], None], type[LutqatError], str]] = {
    "file of no method": (
        bad.params(sensitivity__file=GIVEN),
        *(ParamsError, f"sensitivity.file = {GIVEN} | fisher | to null or"),
    ),
    "method of no file": (
        bad.params(sensitivity__method="file"),
        *(ParamsError, "sensitivity.file = null | set it, or sensitivity.method to fisher"),
    ),
    "file missing": (from_file(None), InputError, f"{GIVEN} is not a file here | give a path"),
    "not JSON": (from_file(b"{"), InputError, f"{GIVEN} is not JSON | mend it"),
    "not UTF-8": (from_file(b"\xff\xfe\xff"), InputError, f"{GIVEN} is not JSON | mend it"),
    "other JSON": (from_file(b"{}\n"), InputError, f"{GIVEN} has no key sensitivity_scores"),
    "no such key": (
        from_file(b'{"scores": [1, 2]}'),
        *(InputError, f"{GIVEN} has no key sensitivity_scores | give a file that has"),
    ),
    "not a number": (
        from_file(b'{"sensitivity_scores": [1, NaN]}'),
        *(InputError, f"{GIVEN} | sensitivity_scores[1] is nan | finite"),
    ),
    "another model's": (
        from_file(b'{"sensitivity_scores": [1, 2, 3]}'),
        *(MismatchError, f"{GIVEN} | is 3 | 2 decoder blocks | of this model"),
    ),
    "another teacher": (
        bad.other_start,
        *(MismatchError, "data/cache/val was made with teacher | rerun"),
    ),
    "temperature beyond float32": (
        bad.params(distill__temperature=1e30),
        *(NonFiniteError, "sensitivity: the loss is | in batch 1 of 4 | distill.temperature"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_loses_nothing(
    capfd: pytest.CaptureFixture[str], name: str
) -> None:
    damage, error, words = CASES[name]
    damage()
    before = bad.contents()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        bad.run_stage("sensitivity")
    assert stopped.value.code == error.exit_code
    printed = capfd.readouterr().err
    for part in words.split(" | "):
        assert part in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert bad.contents() == before
