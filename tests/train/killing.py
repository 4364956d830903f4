"""Training that dies at a given step, as by kill -9."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from lib.train.loop import Report, Trainer
from lib.train.state import Progress


class KilledError(Exception):
    """Stands for a kill -9: nothing of ours catches it."""


def killer(step: int) -> Report:
    """A report that ends the run after this step."""

    def report(progress: Progress) -> None:
        if progress.step == step:
            raise KilledError

    return report


@contextlib.contextmanager
def killed_after(step: int) -> Iterator[list[int]]:
    """Whatever trains inside dies after this step; yields the finished steps before each that was
    begun."""
    begun: list[int] = []
    plain = Trainer.train_step

    def dies(self: Trainer) -> Any:
        begun.append(self.progress.step)
        if self.progress.step == step:
            raise KilledError
        return plain(self)

    with mock.patch.object(Trainer, "train_step", dies), pytest.raises(KilledError):
        yield begun
