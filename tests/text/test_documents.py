from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.base.errors import InputError
from lib.base.packages import PackageFile
from lib.text import documents
from lib.text.documents import (
    ALPACA_MEMBER,
    BOOLQ_DEV_MEMBER,
    BOOLQ_MEMBER,
    WIKIPEDIA_MEMBER,
    Document,
    Instruction,
    licence_of,
    paragraphs,
    read_source,
)
from tests.text.sources import (
    INSTRUCTIONS,
    PROSE,
    AnySource,
    json_lines,
    wikipedia_dump,
    write_sdist,
    write_wheel,
)

LONG = "A sentence that only fills the paragraph up to its length. " * 5


def deliver(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def fetch(package: PackageFile) -> Path:
        return path

    monkeypatch.setattr(documents, "fetch_package", fetch)


def test_boolq_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"passage": f"Harbour -- First. {LONG}"},
        {"passage": f"Harbour -- First. {LONG}"},
        {"passage": f"Rope -- ``Second''. {LONG}"},
        {"passage": "Salt -- Too short."},
        {"passage": f"Tide -- In the benchmark. {LONG}"},
        {"passage": f"Wind -- Also -- in it. {LONG}"},
    ]
    dev = [
        {"title": "Tide", "passage": f"In the benchmark. {LONG}"},
        {"title": "Wind", "passage": f"Also -- in it. {LONG}"},
    ]
    members = {BOOLQ_MEMBER: json_lines(rows), BOOLQ_DEV_MEMBER: json_lines(dev)}
    deliver(monkeypatch, write_wheel(tmp_path / "x.whl", members))
    found = sorted(read_source(AnySource("package:boolq_passages"), 0), key=lambda d: d.title)
    assert found == [
        Document("Harbour", f"First. {LONG}".strip()),
        Document("Rope", f'"Second". {LONG}'.strip()),
    ]


def test_wikipedia_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    article = LONG * 8
    dump = wikipedia_dump(
        [
            ("Rope &amp; Sail", 0, f"'''Rope''' &amp;amp; sail. {article}"),
            ("Ropes", 0, "#REDIRECT [[Rope]]"),
            ("Talk:Rope", 1, article),
            ("Stub", 0, LONG),
        ]
    )
    deliver(monkeypatch, write_wheel(tmp_path / "x.whl", {WIKIPEDIA_MEMBER: dump}))
    found = list(read_source(AnySource("package:wikipedia_articles"), 0))
    assert found == [Document("Rope & Sail", f"Rope & sail. {article}".strip())]


def test_alpaca_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = INSTRUCTIONS.read_bytes()
    deliver(monkeypatch, write_sdist(tmp_path / "x.tar.gz", {ALPACA_MEMBER: content}))
    found = list(read_source(AnySource("package:alpaca_demo", format="alpaca_chat"), 0))
    wanted = [Instruction(r["instruction"], r["input"], r["output"]) for r in json.loads(content)]
    assert found != wanted  # shuffled
    assert sorted(found, key=str) == sorted(wanted, key=str)


def test_order_depends_on_the_seed_alone() -> None:
    source = AnySource(f"path:{PROSE}")
    first = list(read_source(source, 1))
    assert first == list(read_source(source, 1))
    assert first != list(read_source(source, 2))
    assert len(first) == len(paragraphs(PROSE.read_text())) == 42


def test_paragraphs_are_joined_lines() -> None:
    assert paragraphs("\n a\n  b\n \t\nc\n\n\n") == ["a b", "c"]
    assert paragraphs(" \n\n") == []


def test_json_lines_with_a_column_and_a_title(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"title": "T", "body": "one"}, {"body": "two"}, {"body": "  "}]
    path.write_bytes(json_lines(rows))
    found = set(read_source(AnySource(f"path:{path}", column="body"), 0))
    assert found == {Document("T", "one"), Document("two", "two")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("x.json", b'[{"text": "a"},\n oops]', "line 2 is not JSON"),
        ("x.json", b'{"text": "a"}', "must hold JSON objects"),
        ("x.json", b"[1]", "must hold JSON objects"),
        ("x.json", b'[{"body": "a"}]', "without text in 'text'; it has body"),
        ("x.json", b'[{"text": 3}]', "without text in 'text'"),
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_source(AnySource(f"path:{path}"), 0))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt is not a file"):
        list(read_source(AnySource(f"path:{tmp_path / 'absent.txt'}"), 0))


def test_alpaca_keys_are_required(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"prompt": "a", "output": "b"}]')
    with pytest.raises(InputError, match="'instruction'; it has output, prompt"):
        list(read_source(AnySource(f"path:{path}", format="alpaca"), 0))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    """A real data set object of the `datasets` library, made in memory instead of downloaded."""
    import datasets

    asked = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        rows = datasets.Dataset.from_list([{"body": f"text {i}"} for i in range(50)])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = AnySource("hub:a/b:c", column="body", split="validation", streaming=streaming)
    found = list(read_source(source, 0))
    assert asked == [("a/b", "c", "validation", streaming)]
    assert found != [Document(f"text {i}", f"text {i}") for i in range(50)]
    assert {d.text for d in found if isinstance(d, Document)} == {f"text {i}" for i in range(50)}
    assert found == list(read_source(source, 0))


def test_hub_trouble_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> object:
        raise ConnectionError("no route\nlong advice")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"hub:a/b .*no route\)") as caught:
        list(read_source(AnySource("hub:a/b"), 0))
    assert "advice" not in str(caught.value)


def test_every_package_has_a_licence() -> None:
    assert "CC BY-SA" in licence_of(AnySource("package:boolq_passages"))
    assert "CC BY-SA" in licence_of(AnySource("package:wikipedia_articles"))
    assert "CC BY-NC" in licence_of(AnySource("package:alpaca_demo"))
    assert "not known" in licence_of(AnySource("path:x.txt"))
