"""Learning rates and the order of the data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lib.train.schedule import rate_factor, rows_of
from tests.tiny_models import quantized
from tests.train.samples import config, trainer


def test_rate_factor() -> None:
    params = config(steps=10, warmup_steps=4, schedule="cosine", min_rate_ratio=0.1)
    factors = [rate_factor(step, params) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    slow = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(6)]
    assert factors[4:] == pytest.approx(slow)
    assert factors[-1] == pytest.approx(0.1)
    constant = config(steps=10, warmup_steps=2)
    assert [rate_factor(step, constant) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert rate_factor(0, config(steps=1, schedule="cosine")) == 1.0
    assert rate_factor(3, config(steps=4, warmup_steps=4, schedule="cosine")) == 1.0


@pytest.mark.parametrize(("batch", "total"), [(4, 20), (3, 20), (7, 5), (1, 1)])
def test_every_epoch_visits_every_row_once(batch: int, total: int) -> None:
    count = -(-3 * total // batch)
    seen = np.concatenate([rows_of(n, batch, total, seed=1) for n in range(count)])
    epochs = [seen[i * total : (i + 1) * total] for i in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    if total > 1:
        assert any((epochs[0] != epoch).any() for epoch in epochs[1:])
        other = np.concatenate([rows_of(n, batch, total, seed=2) for n in range(count)])
        assert (other != seen).any()
    assert (rows_of(2, batch, total, 1) == seen[2 * batch : 3 * batch]).all()


@pytest.mark.parametrize("processes", [2, 3])
def test_the_order_is_the_same_however_many_processes_share_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Together they take the rows that one takes, step by step; each a part of every batch."""
    made = trainer(quantized(), cache, tmp_path, config(batch_size=6, grad_accum=2))
    size = len(made.train_data)

    class Recorder:
        """Hands out the numbers of the rows themselves."""

        def __len__(self) -> int:
            return size

        def batch(self, rows: np.ndarray) -> list[int]:
            return rows.tolist()

    monkeypatch.setattr(made, "train_data", Recorder())

    def taken(world: int, number: int) -> list[list[int]]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(number))
        return [batch for step in range(20) for batch in made._batches(step)]  # type: ignore[misc]

    alone = taken(1, 0)
    assert sorted([row for batch in alone for row in batch][:size]) == list(range(size))
    shares = [taken(processes, number) for number in range(processes)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert all(len(part) == 6 // processes for part in parts)
        mixed = [row for together in zip(*parts, strict=True) for row in together]
        assert mixed == whole
