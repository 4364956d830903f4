"""A cache of sampled targets: its spec, exact round trips through shards, and what verify finds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.base.errors import CorruptError, MismatchError, ParamsError
from lib.cache.sampled import SampledBatches
from lib.cache.shards import CacheReader, shard_name, write_index, write_shard
from lib.cache.spec import CacheSpec, draw_shifts
from lib.cache.verify import verify
from lib.distill.sampling import draw, importance_weights
from lib.params.data import Cache
from tests.cache.test_shards import SPEC as TOPK
from tests.cache.test_shards import write_cache as write_topk

SPEC = dataclasses.replace(TOPK, targets="sampled", samples=7, sample_temperature=1.5)
Columns = dict[str, np.ndarray]


def columns_of(spec: CacheSpec, rows: int) -> Columns:
    """What a made-up teacher would leave of so many rows."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(0, 3, (rows, spec.positions, spec.vocab_size)))
    logprobs = (logits / spec.sample_temperature).log_softmax(dim=2).flatten(0, 1)
    shifts = torch.from_numpy(np.concatenate([draw_shifts(spec, row) for row in range(rows)]))
    drawn = draw(logprobs, shifts, spec.samples, spec.sample_power)
    shape = (rows, spec.positions)
    return {
        "input_ids": generator.integers(0, 97, (rows, spec.max_length)).astype(np.int32),
        "length": np.full(rows, spec.max_length, dtype=np.int32),
        "sample_ids": drawn.ids.view(*shape, -1).numpy().astype(np.int32),
        "sample_logprobs": logprobs.gather(1, drawn.ids).view(*shape, -1).half().numpy(),
        "threshold": drawn.threshold.view(shape).float().numpy(),
        "top1_ids": logits.argmax(dim=2).numpy().astype(np.int32),
    }


def write(
    folder: Path, spec: CacheSpec, damage: Callable[[Columns], None] | None = None
) -> Columns:
    """Shards of three and two rows; ``damage`` acts on the second."""
    folder.mkdir(parents=True)
    columns, entries = columns_of(spec, 5), []
    for number, (first, stop) in enumerate(((0, 3), (3, 5))):
        part = {name: values[first:stop].copy() for name, values in columns.items()}
        if number and damage is not None:
            damage(part)
        entries.append(write_shard(folder, number, spec, first, part))
    write_index(folder, spec, 5, entries)
    return columns


# --- the spec -----------------------------------------------------------------------------------


def test_json_round_trip_and_fingerprint() -> None:
    assert CacheSpec.from_json(SPEC.to_json(), "here") == SPEC
    changed: dict[str, Any] = {"samples": 8, "sample_temperature": 2.0, "sample_power": 0.5}
    others = [dataclasses.replace(SPEC, **{key: value}) for key, value in changed.items()]
    assert len({spec.fingerprint for spec in (TOPK, SPEC, *others)}) == 5


def test_the_top_k_know_nothing_of_it() -> None:
    """Their caches stay those that they were."""
    plain = TOPK.to_json()
    assert not [key for key in plain if key.startswith(("sample", "targets"))]
    assert dataclasses.replace(TOPK, samples=9).fingerprint == TOPK.fingerprint


def test_bytes_per_token_counts_every_column() -> None:
    # 6 input_ids and length; per position 7 ids, 7 halves, a threshold and the first choice
    assert SPEC.bytes_per_token() == (7 * 4 + 5 * (7 * 6 + 4 + 4)) / 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 98}, ["cache.samples = 98", "vocabulary of 97"]),
        ({"samples": 0}, ["cache.samples = 0", "1 to 97"]),
        ({"codec": "packed"}, ["cache.codec = packed", "sampled", "set it to raw"]),
    ],
)
def test_impossible_specs_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ParamsError) as error:
        dataclasses.replace(SPEC, **changes)
    assert all(word in str(error.value) for word in words)


def test_only_the_train_split_is_sampled() -> None:
    kept = Cache(targets="sampled", samples=9, top_k=40, sample_temperature=3.0, negatives=20)
    identity = {name: getattr(TOPK, name) for name in ("teacher", "tokenizer", "tokens")}
    sizes = {"vocab_size": 97, "max_length": 6}
    train, val = (CacheSpec.of(kept, split=s, **identity, **sizes) for s in ("train", "val"))
    assert (train.targets, train.samples, train.sample_temperature) == ("sampled", 9, 3.0)
    assert (val.targets, val.top_k, val.negatives) == ("topk", 40, 20)
    plain = Cache(top_k=40, negatives=20)
    assert val == CacheSpec.of(plain, split="val", **identity, **sizes)


def test_shifts_depend_on_seed_split_and_row_only() -> None:
    drawn = draw_shifts(SPEC, 8)
    assert drawn.dtype == np.float32 and drawn.shape == (5,)
    other = dataclasses.replace(SPEC, teacher="b", samples=9, sample_power=0.5)
    assert drawn.tolist() == draw_shifts(other, 8).tolist()
    for spec, row in (
        (SPEC, 9),
        (dataclasses.replace(SPEC, seed=4), 8),
        (dataclasses.replace(SPEC, split="val"), 8),
    ):
        assert not set(drawn.tolist()) & set(draw_shifts(spec, row).tolist())


def test_shifts_are_uniform() -> None:
    values = np.sort(np.concatenate([draw_shifts(SPEC, row) for row in range(2000)]))
    assert values[0] >= 0 and values[-1] < 1
    # Kolmogorov and Smirnov: beyond 2.5 / sqrt(n) once in 100,000 times
    steps = np.arange(len(values)) / len(values)
    assert np.abs(values - steps).max() < 2.5 / len(values) ** 0.5


# --- shards -------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    columns = write(tmp_path / "train", SPEC)
    rows = np.array([4, 0, 3, 3])
    rows_of = SampledBatches(CacheReader(tmp_path / "train"))
    batch = rows_of.batch(rows)
    assert len(rows_of) == 5
    for name, values in (
        ("input_ids", batch.input_ids),
        ("sample_ids", batch.sample_ids),
        ("sample_logprobs", batch.logprobs),
        ("top1_ids", batch.top1_ids),
    ):
        np.testing.assert_array_equal(values.numpy(), columns[name][rows])
    logprobs = torch.from_numpy(columns["sample_logprobs"][rows]).float()
    threshold = torch.from_numpy(columns["threshold"][rows])
    assert torch.equal(batch.weights, importance_weights(logprobs, threshold, 1.0))
    assert torch.allclose(batch.weights.sum(dim=2), torch.ones(4, 5), atol=2e-3)
    assert batch.mask.all() and batch.mask.shape == (4, 5)
    assert batch.sample_ids.dtype == batch.top1_ids.dtype == torch.long
    ids, lengths = rows_of.sequences(2)
    np.testing.assert_array_equal(ids.numpy(), columns["input_ids"][:2])
    assert lengths.tolist() == [6, 6]
    moved = batch.to("meta")
    assert all(getattr(moved, f.name).is_meta for f in dataclasses.fields(moved))


def test_padding_is_masked(tmp_path: Path) -> None:
    def shorter(columns: Columns) -> None:
        columns["length"][:] = (3, 1)

    write(tmp_path / "train", SPEC, shorter)
    mask = SampledBatches(CacheReader(tmp_path / "train")).batch(np.array([3, 4])).mask
    assert mask.tolist() == [[True, True, False, False, False], [False] * 5]


def test_there_are_no_candidates_to_read(tmp_path: Path) -> None:
    write(tmp_path / "train", SPEC)
    with pytest.raises(MismatchError, match=r"sampled targets.*set cache.targets to topk") as error:
        CacheReader(tmp_path / "train").batch(np.arange(2))
    assert "\n" not in str(error.value)


def test_a_shard_of_other_draws_is_named_with_both_sides(tmp_path: Path) -> None:
    write(tmp_path / "a", dataclasses.replace(SPEC, sample_power=0.5))
    write(tmp_path / "b", SPEC)
    shutil.copy(tmp_path / "b" / shard_name(1), tmp_path / "a")
    with pytest.raises(MismatchError, match=r"sample_power 1.0, the index says 0.5"):
        SampledBatches(CacheReader(tmp_path / "a")).batch(np.arange(5))


def test_a_shard_of_drawn_targets_among_the_top_k(tmp_path: Path) -> None:
    write_topk(tmp_path / "a", TOPK, [3, 2])
    write(tmp_path / "b", SPEC)
    shutil.copy(tmp_path / "b" / shard_name(1), tmp_path / "a")
    with pytest.raises(MismatchError, match="targets sampled, the index says None"):
        CacheReader(tmp_path / "a")


# --- verify -------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_good_cache(tmp_path: Path, power: float) -> None:
    write(tmp_path / "train", dataclasses.replace(SPEC, sample_power=power))
    assert verify(tmp_path) == 5


def setting(name: str, place: tuple[int, ...], value: float) -> Callable[[Columns], None]:
    def damage(columns: Columns) -> None:
        columns[name][place] = value

    return damage


def swapped(columns: Columns) -> None:
    columns["sample_ids"][1, 2] = columns["sample_ids"][1, 2, ::-1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (setting("input_ids", (1, 2), 97), "row 4, input_ids: ids outside the vocabulary of 97"),
        (setting("length", (1,), 0), "row 4, length: not 1 to 6"),
        (setting("sample_ids", (1, 0, 6), 97), "row 4, sample_ids: ids outside"),
        (setting("sample_ids", (0, 0, 0), -1), "row 3, sample_ids: ids outside"),
        (setting("top1_ids", (1, 0), 97), "row 4, top1_ids: ids outside"),
        (swapped, "row 4, sample_ids: not in ascending order"),
        (setting("sample_logprobs", (1, 0, 0), np.nan), "row 4, sample_logprobs: not finite"),
        (setting("threshold", (0, 4), -np.inf), "row 3, threshold: not finite"),
        (setting("sample_logprobs", (0, 0, 0), 0.5), "row 3, sample_logprobs: above 0"),
        (setting("threshold", (1, 3), -1.0), "row 4, threshold: weights do not sum to 1"),
    ],
)
def test_faults_that_checksums_cannot_tell(
    tmp_path: Path, damage: Callable[[Columns], None], words: str
) -> None:
    write(tmp_path / "train", SPEC, damage)
    with pytest.raises(CorruptError, match=f"{shard_name(1)}: {words}.*rerun the cache stage"):
        verify(tmp_path)
