"""Codec packed: exact ids and first choice, small errors in few bytes, damage found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.teachers import columns_of, packed_spec, zipf_logits
from lib.base.errors import CorruptError, MismatchError
from lib.cache.codec import decode, encode
from lib.cache.layout import record_bytes
from lib.cache.shards import (
    CacheReader,
    check_shard,
    map_shard,
    read_index,
    shard_name,
    write_index,
    write_shard,
)
from lib.cache.spec import CacheSpec, draw_negatives
from tests.cache.divergence import divergence, divergence_with_rest

Columns = dict[str, np.ndarray]


def round_trip(spec: CacheSpec, columns: Columns) -> Columns:
    """What is read back; checks what must be exact."""
    rows = np.arange(len(columns["length"]))
    stored = encode(spec, columns)
    for name, (dtype, shape) in spec.columns().items():
        assert stored[name].dtype == dtype and stored[name].shape == (len(rows), *shape)
    found = decode(spec, rows, stored)
    assert found.keys() == columns.keys()
    for name, values in columns.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape, name
        assert np.isfinite(found[name]).all(), name
    for name in ("input_ids", "length", "negative_ids"):
        np.testing.assert_array_equal(found[name], columns[name])
    ids, wanted = (np.sort(x["topk_ids"], axis=2) for x in (found, columns))
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(found["topk_ids"][:, :, 0], columns["topk_ids"][:, :, 0])
    assert (np.diff(found["topk_logprobs"], axis=2) <= 0).all()
    np.testing.assert_allclose(found["logsumexp"], columns["logsumexp"], rtol=2**-11, atol=1e-6)
    return found


@settings(max_examples=40, deadline=None)
@given(
    vocab_size=st.integers(1, 3000),
    temperatures=st.sampled_from([(), (1.0,), (1.0, 2.0), (0.5, 3.0)]),
    level_bits=st.integers(3, 8),
    kind=st.sampled_from(["normal", "equal", "ties", "steep", "cliff"]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_any_logits(
    vocab_size: int,
    temperatures: tuple[float, ...],
    level_bits: int,
    kind: str,
    seed: int,
    data: st.DataObject,
) -> None:
    k = data.draw(st.integers(1, min(vocab_size, 128)))
    negatives = data.draw(st.integers(0, min(vocab_size - k, 9)))
    spec = packed_spec(
        vocab_size=vocab_size,
        max_length=4,
        top_k=k,
        negatives=negatives,
        temperatures=temperatures,
        level_bits=level_bits,
    )
    generator = np.random.default_rng(seed)
    shape = (2, spec.positions, vocab_size)
    logits = {
        "normal": generator.normal(0, 3, shape),
        "equal": np.zeros(shape),
        "ties": generator.integers(0, 3, shape).astype(float),
        "steep": generator.normal(0, 400, shape),
        "cliff": np.where(generator.random(shape) < 0.5, -1e6, 0.0),
    }[kind]
    logits -= logits.max(axis=2, keepdims=True)
    exact = columns_of(spec, logits)
    found = round_trip(spec, exact)
    if kind == "equal":
        np.testing.assert_allclose(found["topk_logprobs"], exact["topk_logprobs"], atol=0.02)
    limit = 0.03 if k >= 16 else 0.5  # of a few values each may need more than its share of bits
    assert (divergence(exact, found) < limit).all()
    for column in range(len(temperatures)):
        assert (divergence_with_rest(exact, found, spec, column) < 10 * limit).all()


@pytest.mark.parametrize("vocab_size", [49152, 151936])
def test_top_64_in_160_bytes(vocab_size: int) -> None:
    spec = packed_spec(vocab_size=vocab_size)
    assert spec.level_bits == 6
    assert record_bytes(vocab_size, 64, spec.temperatures, 6) <= 160
    assert spec.columns()["records"][1] == (8, record_bytes(vocab_size, 64, (1.0, 2.0), 6))
    exact = columns_of(spec, zipf_logits(spec, 2))
    found = round_trip(spec, exact)
    assert divergence(exact, found).mean() <= 1e-4
    for column in (0, 1):
        assert divergence_with_rest(exact, found, spec, column).mean() <= 1e-4


@pytest.mark.parametrize(
    ("vocab_size", "level_bits", "crowded", "limit"),
    [(49152, 5, True, 1e-4), (49152, 5, False, 4e-4), (151936, 3, False, 6e-3)],
)
def test_top_50_in_110_bytes(vocab_size: int, level_bits: int, crowded: bool, limit: float) -> None:
    """Where 50 ids take 81 of them, the rest is too little for 1e-4 (docs/cache.md)."""
    spec = packed_spec(vocab_size=vocab_size, top_k=50, level_bits=level_bits)
    assert record_bytes(vocab_size, 50, spec.temperatures, level_bits) <= 110
    exact = columns_of(spec, zipf_logits(spec, 2, crowded=crowded))
    found = round_trip(spec, exact)
    assert divergence(exact, found).mean() <= limit


def test_the_rest_does_not_suffer_from_the_levels() -> None:
    """At 3 bits the levels are coarse; the share of the rest stays within its own step."""
    spec = packed_spec(level_bits=3)
    exact = columns_of(spec, zipf_logits(spec, 2))
    found = round_trip(spec, exact)
    assert divergence(exact, found).mean() > 1e-3
    for column, t in enumerate(spec.temperatures):
        odds = []
        for columns in (exact, found):
            scaled = columns["scaled_logsumexp"][:, :, column, None].astype(np.float64)
            inside = np.exp(columns["topk_logprobs"] / t - scaled).sum(axis=2)
            odds.append(np.log((1 - inside) / inside))
        np.testing.assert_allclose(*odds, atol=0.5 * 28 / 1022 + 1e-3)
    np.testing.assert_array_equal(found["scaled_logsumexp"][:, :, 0], 0)


def test_the_whole_vocabulary_has_no_rest() -> None:
    spec = packed_spec(vocab_size=300, top_k=300)
    exact = columns_of(spec, np.random.default_rng(0).normal(0, 3, (2, 8, 300)))
    found = round_trip(spec, exact)
    total = np.exp(found["topk_logprobs"].astype(np.float64)).sum(axis=2)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert divergence(exact, found).mean() < 1e-4
    assert (divergence_with_rest(exact, found, spec, 1) < 5e-3).all()


def test_negatives_within_half_a_level() -> None:
    spec = packed_spec(negatives=255, top_k=128, vocab_size=1000)
    exact = columns_of(spec, np.random.default_rng(0).normal(0, 3, (2, 8, 1000)))
    found = round_trip(spec, exact)
    usable = ~(exact["negative_ids"][:, None, :, None] == exact["topk_ids"][:, :, None]).any(3)
    assert not usable.all()
    values = exact["negative_logprobs"]
    low = np.where(usable, values, np.inf).min(axis=2, keepdims=True)
    high = np.where(usable, values, -np.inf).max(axis=2, keepdims=True)
    assert (high < values.max(axis=2, keepdims=True)).any()  # those of the top k do not count
    error = np.abs(found["negative_logprobs"] - values)
    assert (error[usable] <= np.broadcast_to((high - low) / 30 + 0.02, error.shape)[usable]).all()


def test_bytes_per_token_counts_records_and_negatives() -> None:
    for negatives, extra in ((0, 0), (255, 4 + 128), (256, 4 + 128)):
        spec = packed_spec(negatives=negatives)
        record = record_bytes(49152, 64, (1.0, 2.0), 6)
        assert spec.bytes_per_token() == (9 * 4 + 4 + 8 * (record + extra)) / 9


def test_raw_is_stored_as_it_is() -> None:
    spec = dataclasses.replace(packed_spec(), codec="raw")
    columns = columns_of(spec, zipf_logits(spec, 1))
    for one in (encode(spec, columns), decode(spec, np.arange(1), columns)):
        assert all(one[name] is columns[name] for name in columns)


# --- on disk ------------------------------------------------------------------------------------

SMALL = packed_spec(vocab_size=97, max_length=6, top_k=4, negatives=5)


def write_packed(folder: Path, spec: CacheSpec = SMALL) -> Columns:
    """A cache of shards of three and two rows; returns what it was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    logits = np.random.default_rng(0).normal(0, 3, (5, spec.positions, spec.vocab_size))
    columns = columns_of(spec, logits)
    entries = []
    for number, (first, stop) in enumerate(((0, 3), (3, 5))):
        part = {name: values[first:stop] for name, values in encode(spec, columns).items()}
        entries.append(write_shard(folder, number, spec, first, part))
    write_index(folder, spec, 5, entries)
    return columns


def test_batches_are_the_rows_whatever_their_order(tmp_path: Path) -> None:
    columns = write_packed(tmp_path)
    reader = CacheReader(tmp_path)
    rows = np.array([4, 0, 3, 4])
    batch = reader.batch(rows)
    found = round_trip(SMALL, columns)
    for name in ("topk_ids", "topk_logprobs", "negative_logprobs", "scaled_logsumexp"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), found[name][rows])
    drawn = np.stack([draw_negatives(SMALL, row) for row in rows])
    np.testing.assert_array_equal(batch.negative_ids.numpy(), drawn)
    plain = dataclasses.replace(SMALL, codec="raw")
    assert reader.spec.bytes_per_token() < 0.7 * plain.bytes_per_token()


def test_no_negatives_no_column(tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, negatives=0)
    write_packed(tmp_path, spec)
    assert map_shard(tmp_path / shard_name(0), spec)["negative_levels"].shape == (3, 5, 0)
    batch = CacheReader(tmp_path).batch(np.arange(5))
    assert batch.negative_logprobs.shape == (5, 5, 0) and batch.negative_mask.shape == (5, 5, 0)


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    write_packed(tmp_path)
    path, entry = tmp_path / shard_name(1), read_index(tmp_path).shards[1]
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        with pytest.raises((CorruptError, MismatchError), match=path.name):
            check_shard(tmp_path, SMALL, entry)
    reader = CacheReader(tmp_path)
    with pytest.raises(CorruptError, match=path.name):
        reader.batch(np.array([4]))
    path.write_bytes(good)
    reader.batch(np.array([4]))
