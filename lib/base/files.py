"""Atomic writes, digests and fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.base.errors import CorruptError, InputError

FINGERPRINT_LENGTH = 16  # hexadecimal digits, 64 bits: enough to tell runs apart, short to read


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Short digest of any JSON-serializable value; key order does not matter.

    Raises:
        TypeError: the value holds something JSON cannot express.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LENGTH]


def fsync_path(path: Path) -> None:
    """Flush a file (or a folder's entries) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it over ``path``.

    The name is fixed (``.tmp-NAME``), so what a killed process left is overwritten, not piled up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success it replaces ``path`` whole.

    A folder that is there already steps aside until the new one has its name: whatever happens,
    one of them is left whole. See :func:`bring_back` for a kill between the two renames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    bring_back(path)
    temporary, old = path.with_name(f".tmp-{path.name}"), _aside(path)
    for leftover in (temporary, old):
        _remove(leftover)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            fsync_path(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:
        bring_back(path)
        _remove(temporary)
        raise
    _remove(old)


def _aside(path: Path) -> Path:
    return path.with_name(f".tmp-old-{path.name}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def bring_back(path: Path) -> None:
    """Give a folder its name again that :func:`atomic_folder` had moved aside for a new one which
    never came; no effect otherwise."""
    if not path.exists() and _aside(path).exists():
        os.replace(_aside(path), path)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file does not exist.
        CorruptError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; run the stage that makes it") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number without end
        raise CorruptError(f"{path} is not valid JSON ({error}); delete it and rerun") from None


def write_sealed(path: Path, body: dict[str, Any]) -> None:
    """Write ``body`` as :func:`write_json` does, with a digest of it under ``digest``."""
    write_json(path, {**body, "digest": fingerprint(body)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`write_sealed` wrote, without the digest.

    Raises:
        InputError: the file does not exist.
        CorruptError: the file is damaged, or was edited.
    """
    body = read_json(path)
    if not isinstance(body, dict) or not is_sealed(body):
        raise CorruptError(f"{path} is damaged or was edited; delete it and rerun")
    return {key: value for key, value in body.items() if key != "digest"}


def is_sealed(body: dict[str, Any]) -> bool:
    """Whether ``digest`` is that of everything else."""
    rest = {key: value for key, value in body.items() if key != "digest"}
    try:
        return bool(body.get("digest") == fingerprint(rest))
    except (ValueError, RecursionError):  # what we never write: NaN, infinity, endless nesting
        return False


def code_fingerprint(root: Path | None = None) -> str:
    """Digest of every Python source of ``lib``: a run is not resumed by other code."""
    folder = root or Path(__file__).resolve().parent.parent
    sources = sorted(folder.rglob("*.py"))
    return fingerprint({str(p.relative_to(folder)): sha256_file(p) for p in sources})
