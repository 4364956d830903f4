"""Verifying a cache: the first fault, whatever it is, by file, row and column."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.teachers import columns_of, packed_spec
from lib.base.errors import CorruptError, InputError
from lib.base.files import fingerprint, read_json, write_json
from lib.cache.codec import encode
from lib.cache.shards import shard_name, write_index, write_shard
from lib.cache.spec import CacheSpec
from lib.cache.verify import cache_folders, verify

PACKED = packed_spec(vocab_size=97, max_length=6, top_k=4, negatives=5)
RAW = dataclasses.replace(PACKED, codec="raw")
Damage = Callable[[dict[str, np.ndarray]], None]


def write(folder: Path, spec: CacheSpec, damage: Damage | None = None) -> Path:
    """Shards of three and two rows with right checksums; ``damage`` acts on the second."""
    folder.mkdir(parents=True)
    logits = np.random.default_rng(0).normal(0, 3, (5, spec.positions, spec.vocab_size))
    stored = encode(spec, columns_of(spec, logits))
    entries = []
    for number, (first, stop) in enumerate(((0, 3), (3, 5))):
        part = {name: values[first:stop].copy() for name, values in stored.items()}
        if spec.codec == "raw":
            layout = spec.columns()
            part = {name: values.astype(layout[name][0]) for name, values in part.items()}
        if number and damage is not None:
            damage(part)
        entries.append(write_shard(folder, number, spec, first, part))
    write_index(folder, spec, 5, entries)
    return folder


@pytest.mark.parametrize("spec", [RAW, PACKED], ids=["raw", "packed"])
def test_a_good_cache(tmp_path: Path, spec: CacheSpec) -> None:
    write(tmp_path / "val", dataclasses.replace(spec, split="val"))
    write(tmp_path / "train", spec)
    assert verify(tmp_path / "train") == 5
    assert verify(tmp_path) == 10
    assert [path.name for path in cache_folders(tmp_path)] == ["train", "val"]


def setting(name: str, place: tuple[int, ...], value: float) -> Damage:
    def damage(columns: dict[str, np.ndarray]) -> None:
        columns[name][place] = value

    return damage


def swapped(columns: dict[str, np.ndarray]) -> None:
    columns["topk_logprobs"][1, 2] = columns["topk_logprobs"][1, 2, ::-1]


def emptied(columns: dict[str, np.ndarray]) -> None:
    columns["records"][1, 2:] = 0


def doubled(columns: dict[str, np.ndarray]) -> None:
    columns["topk_ids"][1, 2, 1] = columns["topk_ids"][1, 2, 3]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (setting("input_ids", (1, 2), 97), "row 4, input_ids: ids outside the vocabulary of 97"),
        (setting("input_ids", (0, 2), -1), "row 3, input_ids: ids outside"),
        (setting("length", (1,), 0), "row 4, length: not 1 to 6"),
        (setting("topk_ids", (1, 0, 0), 97), "row 4, topk_ids: ids outside"),
        (doubled, "row 4, topk_ids: the same id twice"),
        (setting("negative_ids", (1, 0), 3), "row 4, negative_ids: not those of seed and row"),
        (setting("topk_logprobs", (1, 0, 0), np.nan), "row 4, topk_logprobs: not finite"),
        (setting("negative_logprobs", (0, 4, 1), -np.inf), "row 3, negative_logprobs: not finite"),
        (setting("logsumexp", (1, 0), np.inf), "row 4, logsumexp: not finite"),
        (setting("scaled_logsumexp", (1, 0, 1), np.nan), "row 4, scaled_logsumexp: not finite"),
        (setting("topk_logprobs", (1, 0, 0), 0.5), "row 4, topk_logprobs: above 0"),
        (swapped, "row 4, topk_logprobs: not in descending order"),
    ],
)
def test_faults_that_checksums_cannot_tell(tmp_path: Path, damage: Damage, words: str) -> None:
    write(tmp_path / "train", RAW, damage)
    with pytest.raises(CorruptError, match=f"{shard_name(1)}: {words}.*rerun the cache stage"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (emptied, "rows 3 to 4: a record ends too early"),
        (setting("records", (0, 2, slice(0, 2)), 0x7C), "row 3, logsumexp: not finite"),
        (setting("negative_levels", (1, 0, slice(0, 2)), 0x7C), "row 4, negative_logprobs: not f"),
    ],
)
def test_packed_faults_that_checksums_cannot_tell(
    tmp_path: Path, damage: Damage, words: str
) -> None:
    write(tmp_path / "train", PACKED, damage)
    with pytest.raises(CorruptError, match=f"{shard_name(1)}: {words}"):
        verify(tmp_path)


def test_damaged_bytes_foreign_shards_and_other_splits(tmp_path: Path) -> None:
    train, val = write(tmp_path / "train", PACKED), tmp_path / "val"
    write(val, dataclasses.replace(PACKED, split="val", teacher="teacher-b"))
    with pytest.raises(CorruptError, match="train has teacher teacher-a, .*val has teacher-b"):
        verify(tmp_path)
    shard = train / shard_name(1)
    good = shard.read_bytes()
    shard.write_bytes(good[:-9] + b"#" + good[-8:])
    with pytest.raises(CorruptError, match=f"{shard_name(1)} is damaged"):
        verify(tmp_path)
    shard.write_bytes((val / shard_name(1)).read_bytes())
    with pytest.raises(CorruptError, match=f"{shard_name(1)} belongs to another cache"):
        verify(tmp_path)


def test_indexes_that_do_not_fit(tmp_path: Path) -> None:
    train = write(tmp_path / "train", PACKED)
    whole = read_json(train / "index.json")

    def edited(**changes: object) -> None:
        body = {**whole, **changes}
        del body["digest"]
        write_json(train / "index.json", {**body, "digest": fingerprint(body)})

    edited(fingerprint="0" * 16)
    with pytest.raises(CorruptError, match=f"fingerprint {'0' * 16}, not {PACKED.fingerprint}"):
        verify(train)
    edited(rows=6)
    with pytest.raises(CorruptError, match="unfinished"):
        verify(train)
    one, two = whole["shards"]
    edited(shards=[{**one, "rows": 2}, {**two, "rows": 3}])
    with pytest.raises(CorruptError, match="holds 3 rows from 0 on, the index says 2 from 0 on"):
        verify(train)


def test_no_cache(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no teacher cache"):
            verify(folder)
