"""Lists of integers as bits: a unary class each, then as many further bits as the class says.

Rows are coded side by side, so writing and reading are a few array operations whatever the lengths.
With order m the value v is, in the Rice code, v >> m in unary and the m low bits; in the
exponential Golomb code, the number c of doublings that (v >> m) + 1 holds in unary, and m + c
bits. The first suits gaps of a uniform random set (they are geometric), the second values that
thin out like a power law.

Shapes: N rows, m values of a row, W bits of a row (a multiple of 8).

Source: Golomb, "Run-length encodings" (1966); Rice, "Some practical universal noiseless coding
techniques" (1979); Teuhola, "A compression method for clustered bit-vectors" (1978).
"""

from __future__ import annotations

import numpy as np


def doublings(values: np.ndarray) -> np.ndarray:
    """floor(log2(v + 1)) of values from 0 on."""
    return np.frexp(values.astype(np.float64) + 1)[1].astype(np.int64) - 1


def code_bits(values: np.ndarray, order: int, exponential: bool) -> np.ndarray:
    """Bits ``[N]`` that the values ``[N, m]`` of each row take."""
    high = values >> order
    if exponential:
        high = 2 * doublings(high)
    return high.sum(axis=1) + values.shape[1] * (1 + order)


def put(bits: np.ndarray, start: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> None:
    """Write values ``[N, m]`` into ``bits`` uint8 ``[N, W]``, highest bit first.

    Args:
        start: bit ``[N, m]`` of the row at which each begins; lengths: ``[N, m]``, maybe 0.
    """
    rows, width = bits.shape
    sizes = lengths.ravel()
    owner = np.repeat(np.arange(sizes.size), sizes)
    place = np.arange(owner.size) - (np.cumsum(sizes) - sizes)[owner]
    flat = (np.arange(rows)[:, None] * width + start).ravel()
    bits.reshape(-1)[flat[owner] + place] = values.ravel()[owner] >> (sizes[owner] - 1 - place) & 1


def put_codes(
    bits: np.ndarray,
    start: np.ndarray,
    values: np.ndarray,
    order: np.ndarray,
    exponential: np.ndarray,
) -> np.ndarray:
    """Write the code of values ``[N, m]`` from bit ``start [N]`` on; returns the bit behind it.

    Args:
        order, exponential: ``[N]``, of each row.
    """
    order, exponential = order[:, None], exponential[:, None]
    high = values >> order
    classes = np.where(exponential, doublings(high), high)
    ones = start[:, None] + np.cumsum(classes + 1, axis=1) - 1
    bits[np.arange(len(bits))[:, None], ones] = 1
    lengths = order + np.where(exponential, classes, 0)
    # v + 2^m lies in [2^(m + c), 2^(m + c + 1)): its low m + c bits say which it is
    low = (values + np.where(exponential, 1 << order, 0)) & ((1 << lengths) - 1)
    ends = ones[:, -1:] + 1 + np.cumsum(lengths, axis=1)
    put(bits, ends - lengths, low, lengths)
    return ends[:, -1]


class BitReader:
    """Fields and codes of packed rows, uint8 ``[N, W / 8]``."""

    def __init__(self, packed: np.ndarray) -> None:
        rows, size = packed.shape
        self._rows = np.arange(rows)[:, None]
        self._size = size
        self._ones = np.flatnonzero(np.unpackbits(packed, axis=1).view(np.bool_))
        padded = np.zeros((rows, size + 4), dtype=np.int64)
        padded[:, :size] = packed
        self._windows = padded[:, :size] << 32
        for byte in range(1, 5):
            self._windows |= padded[:, byte : size + byte] << (32 - 8 * byte)

    def fields(self, start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The integers ``[N, m]`` of so many bits from bit ``start [N, m]`` on: at most 32, which
        a window of 40 bits from any byte on holds."""
        byte = np.minimum(start >> 3, self._size - 1)  # a field of no bits may lie at the end
        return self._windows[self._rows, byte] >> (40 - (start & 7) - lengths) & (
            (1 << lengths) - 1
        )

    def codes(
        self, start: np.ndarray, count: int, order: np.ndarray, exponential: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What :func:`put_codes` wrote: values ``[N, count]`` and the bit ``[N]`` behind them."""
        order, exponential = order[:, None], exponential[:, None]
        base = self._rows * (8 * self._size)
        first = np.searchsorted(self._ones, base[:, 0] + start)
        ones = self._ones[first[:, None] + np.arange(count)] - base
        classes = np.diff(ones, axis=1, prepend=start[:, None] - 1) - 1
        lengths = order + np.where(exponential, classes, 0)
        ends = ones[:, -1:] + 1 + np.cumsum(lengths, axis=1)
        low = self.fields(ends - lengths, lengths)
        high = np.where(exponential, (1 << classes) - 1, classes)
        return low + (high << order), ends[:, -1]
