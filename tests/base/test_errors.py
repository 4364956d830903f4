"""Errors for the user: one line, also when several processes meet the same trouble."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lib.base.errors import (
    DISK_FULL_EXIT_CODE,
    MACHINE_EXIT_CODE,
    InputError,
    exit_on_error,
    trouble_of,
)


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


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "x", "a/b"), DISK_FULL_EXIT_CODE, "no space left on the disk while"),
        (OSError(errno.EFBIG, "x", "a/b"), DISK_FULL_EXIT_CODE, "allows no larger one while"),
        (OSError(errno.EIO, "x", "a/b"), MACHINE_EXIT_CODE, "input/output error with a/b; check"),
        (
            PermissionError(errno.EACCES, "x", "a/b"),
            MACHINE_EXIT_CODE,
            "permission denied with a/b",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8"),
            *(DISK_FULL_EXIT_CODE, "no space left on the disk, it seems"),
        ),
        (SafetensorError("I/O error (os error 5)"), MACHINE_EXIT_CODE, "input/output error; check"),
    ],
)
def test_trouble_of_the_machine_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, words: str
) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise error
    line = capsys.readouterr().err
    assert stop.value.code == code and line.count("\n") == 1
    assert words in line and "run the same command again" in line


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "x"), OSError("x"), KeyError("os error 28")]
)
def test_defects_keep_their_traceback(error: Exception) -> None:
    assert trouble_of(error) is None
    with pytest.raises(type(error)), exit_on_error():
        raise error
