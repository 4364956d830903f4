"""The exponential moving average that scores of gradients are smoothed with."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

_V = TypeVar("_V", float, Tensor)


def moved_average(average: _V, value: _V, beta: float) -> _V:
    """``beta * average + (1 - beta) * value``. What starts at 0 is too small by ``1 - beta^t``."""
    return beta * average + (1 - beta) * value
