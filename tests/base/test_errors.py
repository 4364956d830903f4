"""Errors for the user: one line, also when several processes meet the same trouble."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.base.errors import InputError, exit_on_error


def fail(capsys: pytest.CaptureFixture[str]) -> str:
    """What one process prints that meets an error."""
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise InputError("no\nsuch file")
    assert stop.value.code == InputError.exit_code
    return capsys.readouterr().err


def test_the_first_of_several_processes_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for rank in ("1", "0", "2"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        said.append(fail(capsys))
    assert said == ["error: no such file\n", "", ""]


@pytest.mark.parametrize("own", [None, "", os.devnull, "/no/such/folder/0/error.json"])
def test_without_a_common_folder_everyone_speaks(
    own: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if own is not None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", own)
    assert [fail(capsys) for _ in range(2)] == ["error: no such file\n"] * 2
