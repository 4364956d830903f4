"""Integers as bits: what is written is what is read, in as many bits as were counted."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib.cache.bits import BitReader, code_bits, doublings, put, put_codes


@given(
    rows=st.integers(1, 4),
    count=st.integers(1, 6),
    most=st.sampled_from([0, 1, 5, 300]),
    gap=st.integers(0, 9),
    seed=st.integers(0, 999),
)
def test_codes_round_trip_in_the_bits_counted(
    rows: int, count: int, most: int, gap: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, most + 1, (rows, count))
    order = generator.integers(0, 7, rows)
    kind = generator.random(rows) < 0.5
    start = generator.integers(0, gap + 1, rows)
    counted = [
        int(code_bits(values[[row]], int(order[row]), bool(kind[row]))[0]) for row in range(rows)
    ]
    width = -(-(gap + max(counted)) // 8) * 8
    bits = np.zeros((rows, width), dtype=np.uint8)
    end = put_codes(bits, start, values, order, kind)
    assert (end - start).tolist() == counted
    found, behind = BitReader(np.packbits(bits, axis=1)).codes(start, count, order, kind)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(behind, end)


def slow_code(value: int, order: int, exponential: bool) -> str:
    """The two codes as they are defined, a character per bit."""
    high, low = value >> order, value & ((1 << order) - 1)
    tail = f"{low:0{order}b}" if order else ""
    if not exponential:
        return "0" * high + "1" + tail
    digits = f"{high + 1:b}"  # as many zeros as digits behind the first, then those digits
    return "0" * (len(digits) - 1) + "1" + digits[1:] + tail


def test_one_value_takes_the_defined_bits() -> None:
    for exponential in (False, True):
        for order in range(4):
            for value in range(40):
                wanted = slow_code(value, order, exponential)
                bits = np.zeros((1, 64), dtype=np.uint8)
                kind = np.array([exponential])
                at = np.array([3])
                end = put_codes(bits, at, np.array([[value]]), np.array([order]), kind)
                assert "".join(map(str, bits[0, 3 : end[0]])) == wanted
                assert not bits[0, :3].any() and not bits[0, end[0] :].any()


@given(st.lists(st.integers(0, 32), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_fields_of_any_width(lengths: list[int], seed: int) -> None:
    widths = np.array([lengths])
    values = np.array([[seed & ((1 << length) - 1) for length in lengths]])
    start = np.cumsum(widths, axis=1) - widths
    bits = np.zeros((1, max(8, -(-sum(lengths) // 8) * 8)), dtype=np.uint8)
    put(bits, start, values, widths)
    found = BitReader(np.packbits(bits, axis=1)).fields(start, widths)
    np.testing.assert_array_equal(found, values)


def test_doublings() -> None:
    values = np.array([0, 1, 2, 3, 6, 7, 2**20 - 2, 2**20 - 1])
    assert doublings(values).tolist() == [0, 1, 1, 2, 2, 3, 19, 20]
