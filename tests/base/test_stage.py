"""Stages called by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lib.base.errors import BusyError, InputError
from lib.base.locks import sole_writer
from lib.base.stage import run_stage

seen: list[Path] = []


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def main(teacher: Path, out: Path) -> None:
    """Note what came in."""
    seen.extend((teacher, out))
    if str(out) == "bad":
        raise InputError("bad is bad")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    seen.clear()
    monkeypatch.setattr(sys, "argv", ["stages.some", *arguments])
    run_stage(main)


def test_paths_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "one", "two")
    assert seen == [Path("one"), Path("two")]


@pytest.mark.parametrize("arguments", [(), ("one",), ("one", "two", "three")])
def test_a_wrong_number_of_paths_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == InputError.exit_code and seen == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{len(arguments)} arguments were given instead of 2: TEACHER OUT" in error


def test_errors_become_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "one", "bad")
    assert stop.value.code == InputError.exit_code


def test_help_explains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--help")
    assert capsys.readouterr().out == "Stages called by hand.\n" and seen == []


def test_a_folder_has_one_writer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with sole_writer("some", Path("two")):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, "one", "two")
        assert stop.value.code == BusyError.exit_code and seen == []
        error = capsys.readouterr().err
        assert "already running in another process (it holds two)" in error
        call(monkeypatch, "one", "three")
        monkeypatch.setenv("RANK", "0")  # its launcher holds the folder for it
        call(monkeypatch, "one", "two")
    monkeypatch.delenv("RANK")
    call(monkeypatch, "one", "two")
    assert seen == [Path("one"), Path("two")]
