"""Atomic folders and sealed files: one whole version at any moment, and damage that is seen."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from lib.base import files
from lib.base.errors import CorruptError, InputError
from lib.base.files import atomic_folder, bring_back, read_json, read_sealed, write_sealed


def make(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "file").write_text(text)


def found(path: Path) -> dict[str, str]:
    """What lies beside ``path``: names and contents."""
    return {p.relative_to(path.parent).as_posix(): p.read_text() for p in path.parent.rglob("file")}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_loses_neither_folder_nor_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The first rename moves the old folder aside, the second brings the new one."""
    path = tmp_path / "model"
    make(path, "old")
    calls: list[object] = []

    def full(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            make(path, "new")
    assert found(path) == {"model/file": "old"}
    make(path, "new")
    assert found(path) == {"model/file": "new"}


def test_a_kill_between_the_renames_is_undone(tmp_path: Path) -> None:
    path = tmp_path / "model"
    make(path, "old")
    path.rename(tmp_path / ".tmp-old-model")
    (tmp_path / ".tmp-model").mkdir()
    (tmp_path / ".tmp-model" / "file").write_text("new")
    bring_back(path)
    assert path.joinpath("file").read_text() == "old"
    make(path, "newer")
    assert found(path) == {"model/file": "newer"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_steps_aside_and_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    path = tmp_path / "model"
    path.symlink_to(tmp_path / "elsewhere")
    for text in ("one", "two"):
        make(path, text)
    assert found(path) == {"elsewhere/file": "kept", "model/file": "two"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "model"]


@pytest.mark.parametrize(
    "text", ["", "{", "\ud800", '{"a": ' + "9" * 5000 + "}", "[" * 100_000], ids=len
)
def test_what_is_no_json_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CorruptError, match=r"some\.json is not valid JSON"):
        read_json(path)


def test_a_sealed_file_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    body = {"rows": [1, 0.1, None, {"x": "é"}], "step": 3}
    write_sealed(path, body)
    assert read_sealed(path) == body
    whole = json.loads(path.read_text())
    for damaged in (
        {**whole, "step": 4},
        {**whole, "step": float("nan")},
        {**whole, "more": 1},
        {key: value for key, value in whole.items() if key != "step"},
        body,
        [whole],
        {},
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(CorruptError, match=r"state\.json is damaged or was edited"):
            read_sealed(path)
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        read_sealed(path)
