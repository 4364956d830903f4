"""Sets of token ids as gaps between them, in a Rice or exponential Golomb code.

A uniform random set of k of V ids needs log2 C(V, k) bits, about k (log2(V / k) + 1.44). The Rice
code of its gaps takes about 0.1 k more, and no set at all takes more than Elias and Fano's
k (m + 1) + V / 2^m bits. Sets that crowd at small ids, as those of a tokenizer do, take fewer: the
best code of either kind is chosen for each.

Shapes: N sets of k ids.

Source: Elias, "Efficient storage and retrieval by content and address of static files" (1974).
"""

from __future__ import annotations

import math

import numpy as np

from lib.cache.bits import BitReader, code_bits, put_codes

ORDER_BITS = 3  # the order is this far below the largest that can pay


def _largest_order(vocab_size: int, k: int) -> int:
    return (vocab_size // k).bit_length()


def _order(vocab_size: int, k: int, code: np.ndarray) -> np.ndarray:
    return np.maximum(_largest_order(vocab_size, k) - code, 0)


def most_bits(vocab_size: int, k: int) -> int:
    """Bits that no set of k ids exceeds."""
    orders = range(_largest_order(vocab_size, k) + 1)
    return min(k * (1 + order) + (vocab_size - k >> order) for order in orders)


def usual_bits(vocab_size: int, k: int) -> int:
    """Bits that uniform random sets take on average."""
    orders = range(_largest_order(vocab_size, k) + 1)
    rice = min(k * (1 + order + 1 / math.expm1(k / vocab_size * 2**order)) for order in orders)
    return min(math.ceil(rice), most_bits(vocab_size, k))


def choose(ids: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaps ``[N, k]`` of ascending ids ``[N, k]``; code of the order and kind that suit best."""
    gaps = np.diff(ids, axis=1, prepend=-1) - 1
    codes = range(2**ORDER_BITS)
    kinds = [(code, exponential) for exponential in (False, True) for code in codes]
    orders = [int(_order(vocab_size, ids.shape[1], np.array(code))) for code in codes]
    best = np.stack([code_bits(gaps, orders[c], kind) for c, kind in kinds]).argmin(axis=0)
    return gaps, best % len(codes), best >= len(codes)


def put_set(
    bits: np.ndarray,
    start: np.ndarray,
    gaps: np.ndarray,
    code: np.ndarray,
    exponential: np.ndarray,
    vocab_size: int,
) -> np.ndarray:
    """Write what :func:`choose` found from bit ``start [N]`` on; returns the bit behind it."""
    order = _order(vocab_size, gaps.shape[1], code)
    return put_codes(bits, start, gaps, order, exponential)


def read_set(
    reader: BitReader,
    start: np.ndarray,
    k: int,
    code: np.ndarray,
    exponential: np.ndarray,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Ascending ids ``[N, k]`` and the bit ``[N]`` behind them."""
    gaps, end = reader.codes(start, k, _order(vocab_size, k, code), exponential)
    return np.cumsum(gaps + 1, axis=1) - 1, end
