"""Nothing of the test text reaches training, not even through the caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.cache.shards import CacheReader
from lib.model.load import load_tokenizer
from lib.params.load import read_yaml
from lib.text.sequences import TokenSet, read_stream
from tests.pipeline.project import STAGES, Project

WINDOW = 20  # tokens, here bytes: more than two different documents have in common by chance
SPECIAL = 3  # ids below it are special tokens
MARKUP = {ord("<"), ord(">")}  # of the chat template, which every chat row has in common


def windows(rows: list[list[int]], markup: set[int]) -> set[tuple[int, ...]]:
    """Every run of tokens inside a row that is plain text."""
    found = set()
    for row in rows:
        for start in range(len(row) - WINDOW + 1):
            run = tuple(row[start : start + WINDOW])
            if min(run) >= SPECIAL and not markup & set(run):
                found.add(run)
    return found


def rows_of(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


@pytest.fixture(scope="module")
def markup(baseline: Project) -> set[int]:
    """Ids of the template's brackets."""
    tokenizer = load_tokenizer(baseline.folder / "data" / "teacher")
    return {tokenizer.convert_tokens_to_ids(chr(code)) for code in MARKUP}


def split(baseline: Project, name: str) -> list[list[int]]:
    tokens = TokenSet(baseline.folder / "data" / "tokens" / name)
    return rows_of(tokens.input_ids, tokens.lengths)


@pytest.mark.parametrize("name", ["train", "val"])
def test_caches_hold_the_rows_of_their_split(baseline: Project, name: str) -> None:
    reader = CacheReader(baseline.folder / "data" / "cache" / name)
    ids, lengths = reader.sequences(len(reader))
    assert rows_of(ids.numpy(), lengths.numpy()) == split(baseline, name)


def test_splits_have_no_text_in_common(baseline: Project, markup: set[int]) -> None:
    found = {name: windows(split(baseline, name), markup) for name in ("train", "val", "test")}
    assert all(len(runs) > 100 for runs in found.values())
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not found[one] & found[other], (one, other)


def test_the_perplexity_text_is_not_trained_on(baseline: Project, markup: set[int]) -> None:
    stream = windows([read_stream(baseline.folder / "data/tokens/test").tolist()], markup)
    assert len(stream) > 500
    for name in ("train", "val"):
        assert not stream & windows(split(baseline, name), markup)


def test_windows_find_what_is_in_common(baseline: Project, markup: set[int]) -> None:
    train = split(baseline, "train")
    a_row = next(row for row in train if windows([row[2:]], markup))
    leaked = [*split(baseline, "test"), a_row[2:]]
    assert windows(leaked, markup) & windows(train, markup)


def test_only_measuring_stages_read_the_test_split(baseline: Project) -> None:
    locked = read_yaml(Path(baseline.folder, "dvc.lock"))["stages"]
    readers = {
        name
        for name in STAGES
        for dep in locked[name]["deps"]
        if "data/tokens/test".startswith(dep["path"])
    }
    assert readers == {"evaluate"}
