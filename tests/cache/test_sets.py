"""Sets of ids: exact, close to the fewest bits there are, and never more than promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.cache.bits import BitReader
from lib.cache.sets import choose, most_bits, put_set, read_set, usual_bits

SIZES = [(49152, 50), (49152, 64), (151936, 50), (151936, 64)]


def round_trip(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Bits ``[N]`` that each set takes; checks that it is read back."""
    k = ids.shape[1]
    bits = np.zeros((len(ids), -(-most_bits(vocab_size, k) // 8) * 8), dtype=np.uint8)
    zero = np.zeros(len(ids), dtype=np.int64)
    gaps, code, kind = choose(ids, vocab_size)
    end = put_set(bits, zero, gaps, code, kind, vocab_size)
    reader = BitReader(np.packbits(bits, axis=1))
    found, behind = read_set(reader, zero, k, code, kind, vocab_size)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_array_equal(behind, end)
    assert end.max() <= most_bits(vocab_size, k)
    return end


@given(vocab_size=st.integers(1, 5000), data=st.data())
def test_any_set_is_exact_and_within_the_bound(vocab_size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(vocab_size, 130)))
    seed = data.draw(st.integers(0, 999))
    power = data.draw(st.sampled_from([0.2, 1.0, 4.0]))  # crowded at the end, nowhere, at the start
    generator = np.random.default_rng(seed)
    order = (generator.random(vocab_size) ** (1 / power)) * np.arange(1, vocab_size + 1) ** power
    round_trip(np.sort(order.argsort()[None, :k]), vocab_size)


@pytest.mark.parametrize(("vocab_size", "k"), SIZES)
def test_hard_sets(vocab_size: int, k: int) -> None:
    last = vocab_size - 1
    sets = [
        np.arange(k),
        np.arange(vocab_size - k, vocab_size),
        np.linspace(0, last, k).astype(int),
        np.append(np.arange(k - 1), last),
        np.append(0, np.arange(vocab_size - k + 1, vocab_size)),
        *(np.sort(last - step * np.arange(k)) for step in (512, 513, 700)),
    ]
    round_trip(np.stack(sets), vocab_size)


@pytest.mark.parametrize(("vocab_size", "k"), SIZES)
def test_random_sets_take_little_more_than_they_must(vocab_size: int, k: int) -> None:
    generator = np.random.default_rng(0)
    ids = np.stack([generator.choice(vocab_size, k, replace=False) for _ in range(200)])
    mean = round_trip(np.sort(ids, axis=1), vocab_size).mean()
    must = (
        math.lgamma(vocab_size + 1) - math.lgamma(k + 1) - math.lgamma(vocab_size - k + 1)
    ) / math.log(2)
    assert must < mean <= usual_bits(vocab_size, k) < must + 0.2 * k
    assert usual_bits(vocab_size, k) < most_bits(vocab_size, k)


def test_sets_that_crowd_take_fewer_bits() -> None:
    generator = np.random.default_rng(0)
    density = 1 / (np.arange(49152) + 100.0)
    density /= density.sum()
    ids = [generator.choice(49152, 64, replace=False, p=density) for _ in range(50)]
    assert round_trip(np.sort(ids, axis=1), 49152).mean() < 0.95 * usual_bits(49152, 64)


def test_the_whole_vocabulary_takes_a_bit_each() -> None:
    assert round_trip(np.arange(97)[None], 97).tolist() == [97]
