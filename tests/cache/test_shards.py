"""Cache shards: exact round trips, every kind of damage refused by name, masks and negatives."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.base.files import fingerprint
from lib.cache import shards
from lib.cache.shards import (
    CacheReader,
    map_shard,
    negative_mask,
    shard_name,
    write_index,
    write_shard,
)
from lib.cache.spec import CacheSpec

MAPS = Path("/proc/self/maps")
SPEC = CacheSpec(
    teacher="teacher-a",
    tokenizer="tokenizer-a",
    tokens="tokens-a",
    split="train",
    vocab_size=97,
    max_length=6,
    top_k=4,
    negatives=5,
    temperatures=(1.0, 2.0),
    seed=3,
)


def random_columns(spec: CacheSpec, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Columns of a possible cache; ids are distinct where the teacher's would be."""
    generator = np.random.default_rng(seed)
    columns = {}
    for name, (dtype, shape) in spec.columns().items():
        if name in ("topk_ids", "negative_ids"):
            scores = generator.random((rows, *shape[:-1], spec.vocab_size))
            columns[name] = scores.argsort(axis=-1)[..., : shape[-1]].astype(dtype)
        elif dtype == np.int32:
            high = spec.vocab_size if name == "input_ids" else spec.max_length + 1
            columns[name] = generator.integers(1, high, (rows, *shape)).astype(dtype)
        else:
            columns[name] = generator.normal(-5, 2, (rows, *shape)).astype(dtype)
    return columns


def write_cache(folder: Path, spec: CacheSpec, sizes: list[int], seed: int = 0) -> dict[str, Any]:
    """A cache with shards of these sizes; returns all of its columns."""
    folder.mkdir(parents=True)
    columns = random_columns(spec, sum(sizes), seed)
    entries, first = [], 0
    for number, size in enumerate(sizes):
        part = {name: values[first : first + size] for name, values in columns.items()}
        entries.append(write_shard(folder, number, spec, first, part))
        first += size
    write_index(folder, spec, first, entries)
    return columns


def read_everything(folder: Path) -> None:
    reader = CacheReader(folder)
    reader.batch(np.arange(len(reader)))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    length=st.integers(2, 7),
    top_k=st.integers(1, 9),
    negatives=st.integers(0, 9),
    temperatures=st.sampled_from([(), (1.0,), (1.0, 2.0)]),
    data=st.data(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    length: int,
    top_k: int,
    negatives: int,
    temperatures: tuple[float, ...],
    data: st.DataObject,
) -> None:
    spec = dataclasses.replace(
        SPEC, max_length=length, top_k=top_k, negatives=negatives, temperatures=temperatures
    )
    folder = tmp_path_factory.mktemp("round") / "cache"
    columns = write_cache(folder, spec, sizes)
    reader = CacheReader(folder)
    assert reader.spec == spec and len(reader) == sum(sizes)
    rows = np.array(data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=1, max_size=9)))
    for name, values in reader.gather(rows).items():
        assert values.dtype == columns[name].dtype
        np.testing.assert_array_equal(values, columns[name][rows])


def test_batch_equals_rows(tmp_path: Path) -> None:
    columns = write_cache(tmp_path / "cache", SPEC, [4, 4, 3])
    reader = CacheReader(tmp_path / "cache")
    rows = np.array([9, 0, 4, 3, 4])
    batch = reader.batch(rows)
    for name in ("input_ids", "topk_ids", "negative_ids"):
        assert getattr(batch, name).dtype == torch.long
    for name in ("topk_logprobs", "negative_logprobs", "logsumexp", "scaled_logsumexp"):
        assert getattr(batch, name).dtype == torch.float32
    for i, row in enumerate(rows):
        one = reader.batch(np.array([row]))
        for field in dataclasses.fields(batch):
            assert torch.equal(getattr(batch, field.name)[i], getattr(one, field.name)[0])
            if field.name in columns:
                values = getattr(batch, field.name)[i].numpy()
                np.testing.assert_array_equal(values, columns[field.name][row])


def test_sequences_are_the_first_rows(tmp_path: Path) -> None:
    columns = write_cache(tmp_path / "cache", SPEC, [2, 3])
    reader = CacheReader(tmp_path / "cache")
    for count, rows in ((3, 3), (99, 5)):
        input_ids, lengths = reader.sequences(count)
        np.testing.assert_array_equal(input_ids.numpy(), columns["input_ids"][:rows])
        np.testing.assert_array_equal(lengths.numpy(), columns["length"][:rows])


def test_padding_is_masked(tmp_path: Path) -> None:
    columns = write_cache(tmp_path / "cache", SPEC, [6])
    mask = CacheReader(tmp_path / "cache").batch(np.arange(6)).mask
    for row, length in enumerate(columns["length"]):
        # position p predicts token p + 1, so a row of n tokens has n - 1 usable positions
        assert mask[row].tolist() == [True] * (length - 1) + [False] * (SPEC.max_length - length)


def test_batch_moves_to_a_device_whole(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", SPEC, [2])
    moved = CacheReader(tmp_path / "cache").batch(np.arange(2)).to("meta")
    assert all(getattr(moved, f.name).is_meta for f in dataclasses.fields(moved))


def test_rows_outside_the_cache_raise(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", SPEC, [2])
    for row in (-1, 2):
        with pytest.raises(IndexError):
            CacheReader(tmp_path / "cache").batch(np.array([row]))


def test_same_content_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_cache(tmp_path / name, SPEC, [3, 2])
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_writer_refuses_wrong_columns(tmp_path: Path) -> None:
    columns = random_columns(SPEC, 2, 0)
    with pytest.raises(ValueError, match="logsumexp"):
        write_shard(tmp_path, 0, SPEC, 0, {k: v for k, v in columns.items() if k != "logsumexp"})
    wrong = columns["topk_ids"].astype(np.int64)
    with pytest.raises(ValueError, match="topk_ids"):
        write_shard(tmp_path, 0, SPEC, 0, {**columns, "topk_ids": wrong})
    with pytest.raises(ValueError, match="length"):
        write_shard(tmp_path, 0, SPEC, 0, {**columns, "length": columns["length"][:1]})
    assert not list(tmp_path.iterdir())


# --- damage -------------------------------------------------------------------------------------


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", SPEC, [3, 3])
    path = tmp_path / "cache" / shard_name(1)
    good = path.read_bytes()
    for place in {*range(0, len(good), 61), *range(len(good) - 12, len(good))}:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        with pytest.raises((CorruptError, MismatchError), match=path.name):
            read_everything(path.parent)
    path.write_bytes(good)
    read_everything(path.parent)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_shard_is_refused_at_once(tmp_path: Path, keep: int) -> None:
    write_cache(tmp_path / "cache", SPEC, [3, 3])
    path = tmp_path / "cache" / shard_name(1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=rf"{path.name} is short"):
        CacheReader(path.parent)


def test_missing_shard_is_refused_at_once(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", SPEC, [3, 3])
    (tmp_path / "cache" / shard_name(0)).unlink()
    with pytest.raises(CorruptError, match=rf"{shard_name(0)} is missing"):
        CacheReader(tmp_path / "cache")


@pytest.mark.parametrize("key", ["teacher", "tokens"])
def test_shard_of_another_cache_is_named_with_both_sides(tmp_path: Path, key: str) -> None:
    other = dataclasses.replace(SPEC, **{key: f"{key}-b"})
    write_cache(tmp_path / "a", SPEC, [3, 3])
    write_cache(tmp_path / "b", other, [3, 3], seed=1)
    shutil.copy(tmp_path / "b" / shard_name(1), tmp_path / "a")
    with pytest.raises(MismatchError, match=rf"{shard_name(1)}.*{key}-b.*{key}-a"):
        read_everything(tmp_path / "a")


def test_shards_in_each_others_place_are_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", SPEC, [3, 3])
    one, two = (tmp_path / "cache" / shard_name(n) for n in (0, 1))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(CorruptError, match=rf"{shard_name(0)} holds rows from 3 on instead of 0"):
        read_everything(tmp_path / "cache")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rows": 6', '"rows": 3'),
        ('"seed": 3', '"seed": 4'),
        ("teacher-a", "teacher-b"),
        ('"first": 3', '"first": 2'),
        ('"kind": "cache"', '"kind": "tokens"'),
        ('"shards"', '"pieces"'),
        ("{", "["),
    ],
)
def test_edited_index_is_refused(tmp_path: Path, old: str, new: str) -> None:
    write_cache(tmp_path / "cache", SPEC, [3, 3])
    path = tmp_path / "cache" / "index.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CorruptError, match="index.json"):
        CacheReader(path.parent)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"digest": ""}'])
def test_foreign_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(CorruptError, match="index.json"):
        CacheReader(tmp_path)


def test_index_with_a_wrong_spec_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", SPEC, [3])
    path = tmp_path / "cache" / "index.json"
    body = json.loads(path.read_text())
    del body["digest"], body["spec"]["seed"]
    path.write_text(json.dumps({**body, "digest": fingerprint(body)}))
    with pytest.raises(CorruptError, match="does not describe"):
        CacheReader(path.parent)


def test_unfinished_empty_and_absent_caches_are_refused(tmp_path: Path) -> None:
    write_index(tmp_path, SPEC, 6, [write_shard(tmp_path, 0, SPEC, 0, random_columns(SPEC, 3, 0))])
    with pytest.raises(CorruptError, match="unfinished"):
        CacheReader(tmp_path)
    write_index(tmp_path, SPEC, 0, [])
    with pytest.raises(InputError, match="no rows"):
        CacheReader(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        CacheReader(tmp_path / "nowhere")


def test_expectations_are_compared(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", SPEC, [3])
    good = {"teacher": "teacher-a", "tokens": "tokens-a", "vocab_size": 97}
    CacheReader(tmp_path / "cache", expect=good)
    for key, value in {"teacher": "teacher-z", "tokens": "tokens-z", "vocab_size": 98}.items():
        with pytest.raises(MismatchError) as error:
            CacheReader(tmp_path / "cache", expect={**good, key: value})
        assert all(str(side) in str(error.value) for side in (key, value, good[key]))
        assert "\n" not in str(error.value)


# --- many shards ---------------------------------------------------------------------------------


def test_opening_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of many shards is as fast to open as one of few: sizes are compared, no more."""
    write_cache(tmp_path / "cache", SPEC, [1] * 300)
    touched: list[str] = []
    for name in ("map_shard", "sha256_file"):
        plain = getattr(shards, name)

        def noted(path: Path, *rest: Any, plain: Any = plain) -> Any:
            touched.append(path.name)
            return plain(path, *rest)

        monkeypatch.setattr(shards, name, noted)
    reader = CacheReader(tmp_path / "cache")
    assert len(reader) == 300 and not touched
    for _ in range(2):
        reader.batch(np.array([7, 150]))
    names = [shard_name(number) for number in (7, 150)]
    assert [touched.count(name) for name in names] == [3, 3]  # mapped twice, checked once
    assert set(touched) == set(names)


@pytest.mark.skipif(not MAPS.exists(), reason="Linux shows what is mapped")
def test_no_shard_stays_mapped(tmp_path: Path) -> None:
    """Memory does not grow with the rows that were read."""
    write_cache(tmp_path / "cache", SPEC, [2] * 20)
    reader = CacheReader(tmp_path / "cache")
    for row in range(40):
        reader.batch(np.array([row]))
    held = map_shard(tmp_path / "cache" / shard_name(3), SPEC)
    lines = MAPS.read_text().splitlines()
    mapped = {line.split("/")[-1] for line in lines if str(tmp_path) in line}
    assert mapped == {shard_name(3)} and held


def test_a_shard_replaced_while_it_is_in_use_is_noticed(tmp_path: Path) -> None:
    for name, seed in (("cache", 0), ("other", 1)):
        write_cache(tmp_path / name, SPEC, [3, 3], seed)
    reader = CacheReader(tmp_path / "cache")
    reader.batch(np.arange(6))
    path = tmp_path / "cache" / shard_name(1)
    (tmp_path / "other" / shard_name(1)).replace(path)
    reader.batch(np.arange(3))
    with pytest.raises(CorruptError, match=rf"{shard_name(1)} is damaged"):
        reader.batch(np.arange(6))
    path.unlink()
    with pytest.raises(CorruptError, match=rf"{shard_name(1)} is missing"):
        reader.batch(np.arange(6))


# --- negatives ----------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 4),
    k=st.integers(1, 6),
    count=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_negative_mask_against_comparing_all(
    batch: int, positions: int, k: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    negatives = torch.rand(batch, 12, generator=generator).argsort(dim=1)[:, :count]
    topk = torch.rand(batch, positions, 12, generator=generator).argsort(dim=2)[..., :k]
    slow = ~(negatives[:, None, :, None] == topk[:, :, None, :]).any(dim=3)
    assert torch.equal(negative_mask(negatives, topk), slow)


def test_negatives_in_the_top_k_are_masked_in_a_batch(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, top_k=40, negatives=40)
    write_cache(tmp_path / "cache", spec, [3])
    batch = CacheReader(tmp_path / "cache").batch(np.arange(3))
    usable = batch.negative_mask
    assert usable.any() and not usable.all()
    for b, p, r in np.ndindex(*usable.shape):
        assert bool(usable[b, p, r]) == (int(batch.negative_ids[b, r]) not in batch.topk_ids[b, p])
