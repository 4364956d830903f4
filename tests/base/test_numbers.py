"""Only finite numbers reach JSON."""

from __future__ import annotations

import math

import pytest

from lib.base.numbers import finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_no_number(value: float | None) -> None:
    assert finite(value) is None


@pytest.mark.parametrize("value", [0.0, -1.5, 1e300])
def test_a_number(value: float) -> None:
    assert finite(value) == value
