"""A plain stand-in for the source entries of params.yaml, and small archives like the real ones."""

from __future__ import annotations

import bz2
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DATA = Path(__file__).parents[1] / "data"
PROSE = DATA / "prose.txt"
INSTRUCTIONS = DATA / "instructions.json"


@dataclass(frozen=True)
class AnySource:
    source: str
    format: Literal["text", "alpaca", "alpaca_chat"] = "text"
    enable_thinking: bool | Literal["both"] = False
    column: str = "text"
    split: str = "train"
    streaming: bool = False
    sequences: int | None = None


@dataclass(frozen=True)
class AnySettings:
    train: tuple[AnySource, ...]
    test: tuple[AnySource, ...] = ()
    max_length: int = 32
    packing: bool = True
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    val_sequences: int = 20
    test_sequences: int = 20
    seed: int = 0


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_sdist(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def wikipedia_dump(pages: list[tuple[str, int, str]]) -> bytes:
    """Compressed XML of (title, namespace, wikitext already escaped for XML)."""
    body = "".join(
        f"<page>\n<title>{title}</title>\n<ns>{namespace}</ns>\n<revision>"
        f'<text xml:space="preserve">{text}</text></revision></page>\n'
        for title, namespace, text in pages
    )
    return bz2.compress(f"<mediawiki>\n{body}</mediawiki>".encode())
