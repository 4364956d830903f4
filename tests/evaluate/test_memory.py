"""The peak follows an allocation, and a reset forgets it where the system can."""

from __future__ import annotations

import numpy as np

from lib.evaluate.memory import peak_megabytes, reset_peak


def test_peak_follows_an_allocation() -> None:
    resettable = reset_peak()
    before = peak_megabytes()
    block = np.ones(40_000_000, dtype=np.uint8)
    assert block.sum() == 40_000_000
    risen = peak_megabytes()
    assert risen >= before
    if resettable:
        assert 35 < risen - before < 80
        del block
        reset_peak()
        assert peak_megabytes() < risen - 20
