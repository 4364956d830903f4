"""The measuring itself: rivals take turns, and their figures are theirs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.rivals import Contest, Rival, duel


def build(config: dict[str, Any]) -> Callable[[], None]:
    """A step that sleeps and touches so many megabytes."""
    import torch

    def step() -> None:
        time.sleep(config["sleep"])
        torch.ones(config["megabytes"] * 2**18).sum()

    return step


def rival(name: str, sleep: float, megabytes: int = 1) -> Rival:
    config = {"sleep": sleep, "megabytes": megabytes, "threads": 1, "warmup": 1}
    return Rival(name, build, config)


def test_a_duel() -> None:
    quick, slow = rival("quick", 0.02), rival("slow", 0.2, megabytes=300)
    with Contest() as contest:
        contest.enter(quick)
        ratio = duel(contest, quick, slow, rounds=2)
    assert len(quick.seconds) == len(slow.seconds) == 2
    assert min(slow.seconds) > 0.2 and min(quick.seconds) > 0.02
    pairs = [one / other for one, other in zip(slow.seconds, quick.seconds, strict=True)]
    assert ratio == pytest.approx(sum(pairs) / 2)
    assert slow.peak_bytes > quick.peak_bytes + 200e6
    assert "aten::ones" in slow.profile and sum(slow.profile.values()) <= 1.001


def test_a_result_file_explains_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    path = record.save(
        "some", config={"a": 1}, samples={"b": [2.0]}, summary={"c": 3.0}, on=record.machine()
    )
    values = json.loads(path.read_text())
    assert {"name", "date", "config", "versions", "machine", "samples", "summary"} <= set(values)
    assert values["versions"]["torch"] and values["machine"]["processor"]
