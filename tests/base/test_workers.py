"""What a process knows of the others, and how the end of one is explained."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest
import torch

from lib.base import workers
from lib.base.errors import InputError
from lib.base.workers import WorkerError, is_main, join, rank, start_workers, total, world_size


@dataclass
class Failure:
    exitcode: int


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone() -> None:
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    values = torch.ones(2)
    assert total(values) is values
    assert join(torch.device("cuda:3")) == torch.device("cuda:3")
    assert not start_workers("scales", 1)


def test_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (rank(), world_size(), is_main()) == (1, 2, False)
    assert not start_workers("scales", 2)  # it was started already


def test_the_guilty_one_is_named_and_not_those_that_were_stopped() -> None:
    failures = {0: Failure(-signal.SIGTERM), 1: Failure(-signal.SIGKILL)}
    error = workers._explained("scales", failures, 2)
    assert isinstance(error, WorkerError)
    assert str(error).startswith("scales: process 1 of 2 was killed by SIGKILL")
    error = workers._explained("scales", {0: Failure(1)}, 2)
    assert "process 0 of 2 failed (exit 1)" in str(error)


def test_an_error_that_was_explained_keeps_its_exit_code() -> None:
    failures = {0: Failure(InputError.exit_code), 1: Failure(-signal.SIGTERM)}
    error = workers._explained("scales", failures, 2)
    assert isinstance(error, SystemExit) and error.code == InputError.exit_code
