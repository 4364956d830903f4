"""The cache's spec and its negatives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.base.errors import CorruptError, ParamsError
from lib.cache.spec import CacheSpec, draw_negatives
from tests.cache.test_shards import SPEC


def test_json_round_trip_and_fingerprint() -> None:
    assert CacheSpec.from_json(SPEC.to_json(), "here") == SPEC
    changed = {
        "teacher": "x",
        "tokenizer": "x",
        "tokens": "x",
        "split": "val",
        "vocab_size": 98,
        "max_length": 7,
        "top_k": 5,
        "negatives": 6,
        "temperatures": (1.0,),
        "seed": 4,
        "codec": "packed",
        "level_bits": 5,
    }
    names = [field.name for field in dataclasses.fields(SPEC)]
    assert list(changed) == [name for name in names if not name.startswith(("sample", "targets"))]
    prints = {dataclasses.replace(SPEC, **{k: v}).fingerprint for k, v in changed.items()}
    assert len(prints | {SPEC.fingerprint}) == len(changed) + 1


@pytest.mark.parametrize("values", [None, 3, {}, {**SPEC.to_json(), "more": 1}])
def test_foreign_json_is_refused(values: object) -> None:
    with pytest.raises(CorruptError, match="here"):
        CacheSpec.from_json(values, "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 98}, ["cache.top_k = 98", "97"]),
        ({"top_k": 0}, ["cache.top_k = 0"]),
        ({"top_k": 64, "negatives": 34}, ["cache.negatives = 34", "97", "0 to 33"]),
        ({"negatives": -1}, ["cache.negatives = -1"]),
        ({"max_length": 1}, ["tokens.max_length = 1"]),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ParamsError) as error:
        dataclasses.replace(SPEC, **changes)
    assert all(word in str(error.value) for word in words)


def test_bytes_per_token_counts_every_column() -> None:
    # 6 input_ids + length + 5 negative ids: 12 int32; per position 4 ids, 4 + 5 halves, 3 floats
    assert SPEC.bytes_per_token() == (12 * 4 + 5 * (4 * 4 + 9 * 2 + 3 * 4)) / 6


@given(
    row=st.integers(0, 10**6),
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([97, 49152]),
    count=st.integers(0, 60),
)
def test_negatives_are_distinct_and_in_the_vocabulary(
    row: int, seed: int, vocab: int, count: int
) -> None:
    spec = dataclasses.replace(SPEC, vocab_size=vocab, negatives=count, seed=seed)
    drawn = draw_negatives(spec, row)
    assert drawn.dtype == np.int32 and drawn.shape == (count,)
    assert len(set(drawn.tolist())) == count
    assert not count or (drawn.min() >= 0 and drawn.max() < vocab)


def test_negatives_depend_on_seed_split_and_row_only() -> None:
    drawn = draw_negatives(SPEC, 8).tolist()
    assert drawn == draw_negatives(dataclasses.replace(SPEC, teacher="b", top_k=9), 8).tolist()
    for other, row in (
        (SPEC, 9),
        (dataclasses.replace(SPEC, seed=4), 8),
        (dataclasses.replace(SPEC, split="val"), 8),
    ):
        assert drawn != draw_negatives(other, row).tolist()


def test_negatives_cover_the_vocabulary_evenly() -> None:
    rows = 4000
    counts = np.bincount(
        np.concatenate([draw_negatives(SPEC, row) for row in range(rows)]), minlength=97
    )
    expected = rows * SPEC.negatives / SPEC.vocab_size
    # binomial: 5 standard deviations
    assert np.abs(counts - expected).max() < 5 * expected**0.5
