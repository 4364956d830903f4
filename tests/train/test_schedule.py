"""Learning rates and the order of the data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lib.train.schedule import rate_factor, rows_of
from tests.train.samples import config


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
