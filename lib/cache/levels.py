"""Probabilities as integers: uniform steps in sqrt(p), as fine as a number of bits allows.

A value p that is off by a factor e^d costs p d^2 / 2 of KL, and a step of sqrt(p) is a d of 2 step
/ sqrt(p): uniform steps make every value cost the same, which is the least there is for a given
number of bits. With D steps up to the largest value, y = sqrt(p / max p) D is kept as
n = round(y - o), o just below the smallest y, and read back as p proportional to (o + n)^2: the sum
of p is 1 again whatever D was, so D itself is not kept. Where the smallest values are below half a
step, o = 0 and those with n = 0 are read back as one common value, the root of their mean square.

Shapes: N rows, k values of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lib.cache.bits import BitReader, code_bits, put_codes

STEP_BITS = 8  # D while searching, 2^(0 .. 15.94)
OFFSET_BITS, ORDER_BITS = 7, 3
_STEPS = 2 ** (np.arange(2**STEP_BITS) / 16)
_FLOORS = 24  # offset codes that mean o = 0: the common value of n = 0 is then 2^-(1 + code / 2)
_OFFSETS = 2 ** (np.arange(2**OFFSET_BITS - _FLOORS) / 8)
_ORDERS = range(2**ORDER_BITS)


class Levels(NamedTuple):
    """n ``[N, k]``, codes of the offset and orders of the exponential Golomb code ``[N]``."""

    n: np.ndarray
    offset: np.ndarray
    order: np.ndarray


def _round(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """n ``[N, k]`` and the offset's code ``[N]``; floors are chosen later."""
    place = np.searchsorted(_OFFSETS, y.min(axis=1) + 0.5, side="right") - 1
    offset = np.where(place < 0, 0.0, _OFFSETS[place])
    n = np.maximum(np.rint(y - offset[:, None]), 0).astype(np.int64)
    return n, np.where(place < 0, 0, place + _FLOORS)


def _cheapest(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewest bits and the order that gives them, ``[N]`` each."""
    costs = np.stack([code_bits(n, order, exponential=True) for order in _ORDERS])
    return costs.min(axis=0), costs.argmin(axis=0)


def quantize(logprobs: np.ndarray, room: np.ndarray) -> Levels:
    """The finest levels whose code fits.

    Args:
        logprobs: ``[N, k]``, any shift per row.
        room: bits ``[N]``, at least 2 k.
    """
    root = np.exp((logprobs - logprobs.max(axis=1, keepdims=True)) / 2)
    chosen = np.zeros(len(root), dtype=np.int64)
    for bit in reversed(range(STEP_BITS)):
        tried = chosen | 1 << bit
        bits, _ = _cheapest(_round(root * _STEPS[tried][:, None])[0])
        chosen = np.where(bits <= room, tried, chosen)
    y = root * _STEPS[chosen][:, None]
    n, offset = _round(y)
    low = (n == 0) & (offset < _FLOORS)[:, None]
    mean = np.where(low, y**2, 0).sum(axis=1) / np.maximum(low.sum(axis=1), 1)
    floor = np.rint(-2 - np.log2(np.maximum(mean, 1e-30)))
    offset = np.where(low.any(axis=1), np.clip(floor, 0, _FLOORS - 1).astype(np.int64), offset)
    return Levels(n, offset, _cheapest(n)[1])


def dequantize(n: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Log-probabilities ``[N, k]`` that sum to 1 in each row."""
    coded = np.maximum(offset - _FLOORS, 0)
    y = n + np.where(offset < _FLOORS, 0.0, _OFFSETS[coded])[:, None]
    y = np.where(y > 0, y, 2.0 ** -(1 + offset[:, None] / 2))
    return np.log(y**2 / np.square(y).sum(axis=1, keepdims=True))


def put_levels(bits: np.ndarray, start: np.ndarray, levels: Levels) -> None:
    """Write n from bit ``start [N]`` of ``bits`` uint8 ``[N, W]`` on."""
    put_codes(bits, start, levels.n, levels.order, np.ones(len(bits), dtype=np.bool_))


def read_levels(reader: BitReader, start: np.ndarray, k: int, order: np.ndarray) -> np.ndarray:
    """n ``[N, k]`` from bit ``start [N]`` on."""
    return reader.codes(start, k, order, np.ones(len(start), dtype=np.bool_))[0]
