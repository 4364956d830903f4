from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lib.base.errors import BusyError
from lib.base.scratch import scratch_folder

ROOT = Path(__file__).parents[2]

_HOLDER = """
import sys
from lib.base.scratch import scratch_folder
with scratch_folder("cache", "k") as folder:
    (folder / "shard").write_text("half done")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def fail_in(stage: str, key: str) -> Path:
    """A run that leaves one file behind and fails; its scratch folder."""

    def work(folder: Path) -> None:
        (folder / "shard").write_text("1")
        raise KeyError

    with pytest.raises(KeyError), scratch_folder(stage, key) as folder:
        work(folder)
    return folder


def test_deleted_on_success_and_kept_on_failure(tmp_path: Path) -> None:
    assert fail_in("cache", "k") == tmp_path / ".ckpt" / "cache" / "k"
    with scratch_folder("cache", "k") as folder:
        assert (folder / "shard").read_text() == "1"
    assert not folder.exists()


def test_other_keys_are_left_alone() -> None:
    old = fail_in("cache", "old")
    with scratch_folder("cache", "new") as new:
        assert list(new.iterdir()) == []
    assert (old / "shard").exists()


def test_without_dvc_the_current_folder_is_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.chdir(tmp_path)
    with scratch_folder("scales", "k") as folder:
        assert folder == tmp_path / ".ckpt" / "scales" / "k"


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError) as caught, scratch_folder("cache", "k"):
            pass
        holder.kill()
    assert "stage cache" in str(caught.value)
    assert str(tmp_path / ".ckpt" / "cache" / "k") in str(caught.value)
    with scratch_folder("cache", "k") as folder:
        assert (folder / "shard").read_text() == "half done"
