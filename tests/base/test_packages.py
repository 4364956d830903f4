from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lib.base import packages
from lib.base.errors import CorruptError, InputError
from lib.base.packages import PackageFile, fetch_package, read_member

CONTENT = b"not really a wheel"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def package(sha256: str = DIGEST, file: str = "thing-1.0-py3-none-any.whl") -> PackageFile:
    return PackageFile(name="thing", version="1.0", file=file, sha256=sha256)


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


class FakePip:
    """Stands for `subprocess.run`: delivers ``content`` or fails with ``stderr``."""

    def __init__(self, content: bytes | None, stderr: str = "") -> None:
        self.content = content
        self.stderr = stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.content is not None:
            target = Path(command[command.index("--dest") + 1])
            (target / "thing-1.0-py3-none-any.whl").write_bytes(self.content)
            (target / "thing-1.0.tar.gz").write_bytes(self.content)
        code = 1 if self.content is None else 0
        return subprocess.CompletedProcess(command, code, stdout="", stderr=self.stderr)


def use(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> FakePip:
    monkeypatch.setattr(packages.subprocess, "run", pip)
    return pip


def test_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use(monkeypatch, FakePip(CONTENT))
    path = fetch_package(package())
    assert path == tmp_path / "data" / "packages" / package().file
    assert path.read_bytes() == CONTENT
    assert fetch_package(package()) == path
    assert len(pip.commands) == 1
    assert [p.name for p in path.parent.iterdir() if p.name != ".lock"] == [path.name]


def test_every_platform_asks_for_the_same_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use(monkeypatch, FakePip(CONTENT))
    fetch_package(package())
    fetch_package(package(file="thing-1.0.tar.gz"))
    wheel, sdist = (" ".join(command) for command in pip.commands)
    assert "--platform manylinux_2_28_x86_64 --python-version 3.11 --implementation cp" in wheel
    assert "--no-deps" in wheel
    assert "--no-binary thing" in sdist
    assert "--only-binary" not in sdist


def test_another_digest_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakePip(CONTENT))
    with pytest.raises(InputError) as caught:
        fetch_package(package("0" * 64))
    assert DIGEST in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert not list((tmp_path / "data" / "packages").glob("*.whl"))


def test_a_damaged_file_on_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakePip(CONTENT))
    path = fetch_package(package())
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(InputError, match=f"delete {path}"):
        fetch_package(package())


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("ERROR: No matching distribution found for thing==1.0", "No matching distribution"),
        (f"  Expected sha256 {DIGEST}\n       Got        {'a' * 64}\n", "a" * 64),
        ("killed", "pip did not deliver"),
    ],
)
def test_what_pip_says_in_one_line(
    monkeypatch: pytest.MonkeyPatch, stderr: str, expected: str
) -> None:
    use(monkeypatch, FakePip(None, stderr))
    with pytest.raises(InputError, match=expected) as caught:
        fetch_package(package())
    assert "\n" not in str(caught.value)


def test_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process this time: an interpreter that answers as one without pip does."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(packages.sys, "executable", str(script))
    with pytest.raises(InputError, match="has no pip"):
        fetch_package(package())


def test_members_of_both_kinds_of_archive(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/b.txt", "wheel")
    sdist = tmp_path / "a.tar.gz"
    with tarfile.open(sdist, "w:gz") as tar:
        info = tarfile.TarInfo("a/b.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"sdist"))
    assert read_member(wheel, "a/b.txt") == b"wheel"
    assert read_member(sdist, "a/b.txt") == b"sdist"
    for path in (wheel, sdist):
        with pytest.raises(InputError, match="no member a/c.txt"):
            read_member(path, "a/c.txt")
        path.write_bytes(path.read_bytes()[:10])
        with pytest.raises(CorruptError, match="delete it"):
            read_member(path, "a/b.txt")
