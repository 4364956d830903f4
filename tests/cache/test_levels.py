"""Levels of probabilities: as fine as there is room, order kept, awkward values survived."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.cache.bits import BitReader
from lib.cache.levels import dequantize, put_levels, quantize, read_levels


def normalized(logprobs: np.ndarray) -> np.ndarray:
    shifted = logprobs - logprobs.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(logprobs: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL ``[N]`` of each row, nats."""
    exact = normalized(logprobs)
    return (np.exp(exact) * (exact - found)).sum(axis=1)


def round_trip(logprobs: np.ndarray, bits_each: int) -> np.ndarray:
    """What is read back; checks that it took no more than the room."""
    rows, k = logprobs.shape
    width = -(-k * bits_each // 8) * 8
    room = np.full(rows, width)
    found = quantize(logprobs, room)
    bits = np.zeros((rows, width), dtype=np.uint8)
    zero = np.zeros(rows, dtype=np.int64)
    put_levels(bits, zero, found)  # raises where the row is too short
    n = read_levels(BitReader(np.packbits(bits, axis=1)), zero, k, found.order)
    np.testing.assert_array_equal(n, found.n)
    return dequantize(n, found.offset)


def zipf(power: float, k: int = 64) -> np.ndarray:
    return -power * np.log(np.arange(1, k + 1))[None]


@pytest.mark.parametrize("power", [0.3, 1.0, 1.5, 3.0])
def test_another_bit_quarters_the_divergence(power: float) -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, (200, 64))
    logprobs = zipf(power) + noise
    errors = [divergence(logprobs, round_trip(logprobs, bits)).mean() for bits in (4, 5, 6, 7)]
    assert errors[2] < 1e-4
    for more, less in pairwise(errors):
        assert 0.15 < less / more < 0.4


@given(
    k=st.integers(1, 70),
    bits=st.integers(2, 9),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 3000.0]),
    seed=st.integers(0, 999),
)
def test_order_is_kept_and_all_is_finite(k: int, bits: int, spread: float, seed: int) -> None:
    logprobs = -spread * np.random.default_rng(seed).random((3, k)) - 5
    found = round_trip(logprobs, bits)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-12)
    order = logprobs.argsort(axis=1)
    assert (np.diff(np.take_along_axis(found, order, axis=1), axis=1) >= 0).all()


def test_equal_values_stay_equal() -> None:
    found = round_trip(np.full((1, 64), -7.0), 2)
    np.testing.assert_allclose(found, -np.log(64), rtol=1e-12)


def test_a_value_alone_is_certain() -> None:
    assert round_trip(np.array([[-3.0]]), 2).tolist() == [[0.0]]


def test_values_that_are_next_to_nothing_cost_next_to_nothing() -> None:
    logprobs = np.full((1, 64), -65504.0)
    logprobs[0, 5] = -1e-3
    found = round_trip(logprobs, 6)
    assert found.argmax() == 5 and divergence(logprobs, found) < 1e-5
    logprobs[0, :32] = -np.log(32)
    assert divergence(logprobs, round_trip(logprobs, 6)) < 1e-5
