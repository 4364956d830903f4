"""Sizes of what codec ``packed`` stores: a record per position, levels of its negatives."""

from __future__ import annotations

from collections.abc import Sequence

from lib.cache import levels, sets

REST_BITS = 10
NEGATIVE_BITS = 4
NEGATIVE_RANGE = 4  # bytes: the smallest and the largest negative, float16 each


def header(top_k: int, temperatures: Sequence[float]) -> dict[str, int]:
    """The fields at the start of a record, in order, and their bits (docs/cache.md)."""
    return {
        "logsumexp": 16,
        "first": (top_k - 1).bit_length(),
        "set_kind": 1,
        "set_order": sets.ORDER_BITS,
        "level_order": levels.ORDER_BITS,
        "offset": levels.OFFSET_BITS,
        "rest": REST_BITS,
        **{f"rest_{t}": REST_BITS for t in temperatures if t != 1},
    }


def record_bytes(
    vocab_size: int, top_k: int, temperatures: Sequence[float], level_bits: int
) -> int:
    """Bytes of one record: about ``level_bits`` for each probability where the top k are a uniform
    random set, more where they crowd, and never fewer than two."""
    fixed = sum(header(top_k, temperatures).values())
    usual = fixed + sets.usual_bits(vocab_size, top_k) + top_k * level_bits
    least = fixed + sets.most_bits(vocab_size, top_k) + top_k * 2
    return max(usual // 8, -(-least // 8))


def negative_bytes(count: int) -> int:
    """Bytes of one position's negatives."""
    return NEGATIVE_RANGE + -(-count * NEGATIVE_BITS // 8) if count else 0
