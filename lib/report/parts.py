"""What a page is made of; page.html says how each part looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from lib.report.experiment import Experiment

NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The experiment that is reported, and the one that it is compared with, if any."""

    this: Experiment
    other: Experiment | None = None

    @property
    def both(self) -> list[Experiment]:
        """One or two."""
        return [self.this] if self.other is None else [self.this, self.other]

    def files(self, path: str) -> list[tuple[Experiment, dict[str, Any]]]:
        """The experiments that have this file, with its content."""
        return [(one, one.files[path]) for one in self.both if path in one.files]


class Part:
    """Something on a page; the template is chosen by the name of its class."""

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, kw_only=True)
class Note(Part):
    """A paragraph, or a line each; ``tone``: plain, good, bad, warn or absent."""

    lines: Sequence[str | Markup]
    tone: str = "plain"
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a legend: a name and the CSS classes of what it stands for."""

    name: str
    classes: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its caption."""

    title: str
    svg: Markup
    keys: Sequence[Key] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Figures(Part):
    """Charts side by side, or a wide one alone."""

    figures: Sequence[Figure]
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Table(Part):
    """A table whose first cell of each row is its heading.

    ``groups``: a line of headings above ``head``, each with the number of columns that it spans.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    groups: Sequence[tuple[str, int]] = ()
    words: bool = False


@dataclass(frozen=True, kw_only=True)
class Fold(Part):
    """Parts that show when asked for."""

    summary: str
    parts: Sequence[Part]
    open: bool = False


@dataclass(frozen=True, kw_only=True)
class Columns(Part):
    """Small parts that flow into as many columns as there is room for."""

    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said; ``model`` and how it is quantized."""

    model: str
    detail: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Samples(Part):
    """A prompt and the models' answers, side by side."""

    prompt: str
    answers: Sequence[Answer]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A figure that matters, large; ``tone`` as of a note."""

    title: str
    value: Markup
    detail: Sequence[str | Markup] = ()
    tone: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what belongs to it; ``name`` is its anchor."""

    name: str
    title: str
    lead: str
    parts: Sequence[Part] = field(default_factory=list)


def absent(what: str) -> Note:
    """Says that a stage did not run."""
    return Note(lines=[what], tone="absent", title=NOT_RUN.capitalize())
