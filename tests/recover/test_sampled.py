"""Adapters that learn from sampled targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.base.errors import ParamsError
from tests.recover.samples import make_snapped, recover
from tests.tiny_models import make_place


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    """``teacher``, ``cache`` and ``snap``; mode kd_cache needs no tokens."""
    place = make_place(tmp_path / "place", targets="sampled", samples=24)
    make_snapped(place)
    return place


def test_they_teach_adapters(sampled: Path, place: Path, tmp_path: Path) -> None:
    drawn, top = recover(sampled, tmp_path / "a"), recover(place, tmp_path / "b")
    assert drawn.initial_loss == top.initial_loss  # held-out text has its top k
    assert drawn.best_loss < 0.97 * drawn.initial_loss
    assert drawn.rows[1]["kd_loss"] != top.rows[1]["kd_loss"]


def test_candidates_are_refused(sampled: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"hard_top1_weight = 0.1.*cache.targets to topk"):
        recover(sampled, tmp_path / "out", hard_top1_weight=0.1)
