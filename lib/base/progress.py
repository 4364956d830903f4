"""A progress bar for long loops; two plain lines where stderr is a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lib.base.workers import is_main

T = TypeVar("T")


class _Rate(ProgressColumn):
    """Steps per second so far."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "-/s")


def track(iterable: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield the items of ``iterable`` while showing count, rate and time left on stderr.

    Of several processes that work together only the first shows them.

    Args:
        total: number of items expected (items beyond it are yielded too).
        label: what is being done, a few words.
    """
    if not is_main():
        yield from iterable
        return
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield from bar.track(iterable, total=total, description=label)
        return
    print(f"{label}: {total} to do", file=sys.stderr, flush=True)
    started, done = time.monotonic(), 0
    for item in iterable:
        yield item
        done += 1
    seconds = time.monotonic() - started
    print(f"{label}: {done} done in {seconds:.1f} s", file=sys.stderr, flush=True)
