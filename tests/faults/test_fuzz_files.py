"""Checkpoints, cache shards, token rows and saved states with something wrong in them: refused in
one line that names the file, or read as if nothing were wrong; never anything in between."""

from __future__ import annotations

import dataclasses
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.base.errors import LutqatError
from lib.cache.shards import CacheReader
from lib.cache.verify import verify
from lib.model.checkpoint import load_checkpoint, save_checkpoint
from lib.snap.run import snap_stage
from lib.text.sequences import TokenSet, read_stream, write_stream, write_tokens
from lib.train.loop import Trainer
from tests.faults.counts import dice, often
from tests.faults.lines import said
from tests.faults.mutations import mutate, restore
from tests.tiny_models import make_caches, quantized, state_of
from tests.train.killing import KilledError, killer
from tests.train.samples import config, quiet, trainer

GROWTH = 600 * 2**20  # bytes of memory that no damaged file may cost


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(
    name: str,
    tries: int,
    whole: Path,
    files: list[str],
    read: Callable[[Path], Any],
    same: Callable[[Any, Any], bool],
) -> int:
    """Read a folder ``tries`` times with one of its files mutated; returns how often it was
    refused."""
    folder = whole.with_name(f"{whole.name}-mutated")
    expected, before, refused = read(whole), peak(), 0
    for number in range(tries):
        restore(folder, whole)
        what = mutate(dice(name, number), folder, files)
        found, line, code = said(lambda: read(folder))
        where = f"{name} {number}: {what}: {line}"
        if code:
            refused += 1
            assert re.fullmatch(r"error: [^\n]+\n", line), where
            mutated = what.split(":")[0]
            named = (str(folder / mutated), mutated, str(folder / Path(mutated).parent))
            assert any(part in line for part in named), where
        else:
            assert same(found, expected), where
    assert peak() - before < GROWTH
    shutil.rmtree(folder, ignore_errors=True)
    return refused


def same_tensors(one: Any, other: Any) -> bool:
    """Equal dictionaries of tensors or arrays, NaN included."""
    return one.keys() == other.keys() and all(
        np.array_equal(np.asarray(one[k]), np.asarray(other[k]), equal_nan=one[k].dtype.kind == "f")
        for k in one
    )


def as_arrays(values: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values.items()}


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Everything that a loaded checkpoint computes with."""
    model, _ = load_checkpoint(folder)
    ids = torch.arange(12)[None] % 7
    with torch.no_grad():
        return as_arrays({**state_of(model), "logits": model(input_ids=ids).logits})


@pytest.mark.parametrize("kind", ["trained", "snapped"])
def test_checkpoints(tmp_path: Path, kind: str) -> None:
    save_checkpoint(quantized(), tmp_path / "trained", tokenizer_from=tmp_path, info={})
    if kind == "snapped":
        snap_stage(tmp_path / "trained", tmp_path / "out", baked=False)
        shutil.move(tmp_path / "out/model", tmp_path / "snapped")
    files = ["config.json", "model.safetensors"]
    tries = often(60, 200)
    refused = fuzz(kind, tries, tmp_path / kind, files, read_checkpoint, same_tensors)
    assert refused > tries // 2


def read_cache(folder: Path) -> dict[str, np.ndarray]:
    """Every row of a cache, decoded."""
    reader = CacheReader(folder)
    batch = reader.batch(np.arange(len(reader)))
    verify(folder)
    return as_arrays({f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})


@pytest.mark.parametrize("codec", ["raw", "packed"])
def test_caches(tmp_path: Path, codec: str) -> None:
    folder = make_caches(tmp_path / "cache", rows=24, codec=codec) / "train"
    files = [path.name for path in sorted(folder.iterdir())]
    assert len(files) == 4
    tries = often(60, 200)
    refused = fuzz(codec, tries, folder, files, read_cache, same_tensors)
    assert refused > tries // 2


@pytest.mark.parametrize("kind", ["teacher", "split", "levels"])
def test_foreign_files_in_a_folder(tmp_path: Path, kind: str) -> None:
    """A shard of another teacher's or of the other split, weights of another quantization."""
    if kind == "levels":
        for name, levels in (("ours", 16), ("theirs", 4)):
            save_checkpoint(
                quantized(lut_size=levels), tmp_path / name, tokenizer_from=tmp_path, info={}
            )
        read: Callable[[Path], Any] = load_checkpoint
    else:
        for name in ("ours", "theirs"):
            teacher = "another" if kind == "teacher" and name == "theirs" else "one"
            made = make_caches(tmp_path / f"made-{name}", rows=16, teacher=teacher)
            split = "val" if kind == "split" and name == "theirs" else "train"
            (made / split).rename(tmp_path / name)
        read = read_cache
    for path in sorted(tmp_path.joinpath("theirs").iterdir()):
        restore(tmp_path / "mixed", tmp_path / "ours")
        shutil.copyfile(path, tmp_path / "mixed" / path.name)
        _, line, code = said(lambda: read(tmp_path / "mixed"))
        assert code in (4, 5) and line.count("\n") == 1, line
        assert str(tmp_path / "mixed") in line


def read_tokens(folder: Path) -> dict[str, np.ndarray]:
    rows = TokenSet(folder)
    about = {name: np.asarray(str(value)) for name, value in rows.meta.items()}
    arrays = {"ids": rows.input_ids, "lengths": rows.lengths, "prompt": rows.prompt}
    return {**arrays, **about, "stream": read_stream(folder)}


def test_token_rows(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 99, (9, 12), dtype=np.int32)
    about: dict[str, Any] = {"vocab_size": 99, "tokenizer": "abc"}
    folder = tmp_path / "tokens"
    folder.mkdir()
    lengths = np.full(9, 12, np.int32)
    write_tokens(folder, ids, lengths, ids > 50, split="test", pad_id=0, **about)
    write_stream(folder, ids[0], **about)
    files = [path.name for path in sorted(folder.iterdir())]
    tries = often(150, 500)
    refused = fuzz("tokens", tries, folder, files, read_tokens, same_tensors)
    assert refused > tries // 2


@pytest.mark.parametrize("number", range(often(8, 100)))
def test_a_damaged_state_is_not_resumed_from(tmp_path: Path, number: int) -> None:
    """The run begins anew, says so, and ends where it would have ended anyway."""
    cache = make_caches(tmp_path / "cache", rows=16)
    params = config(steps=4, checkpoint_every=2, eval_every=2)

    def make(name: str) -> Trainer:
        return trainer(quantized(), cache, tmp_path / name, params)

    whole = make("whole")
    expected = whole.run(quiet).progress
    with pytest.raises(KilledError):
        make("parts").run(killer(3))
    state = tmp_path / "parts/state"
    what = mutate(dice("state", number), state, ["state.json", "state.safetensors"])
    again = make("parts")
    result, line, code = said(lambda: again.run(quiet))
    assert code == 0, (what, line)
    gone = "deleted" in what or "a folder" in what
    assert gone or re.search("beginning anew|going on after step 2", line), what
    assert result.progress == expected, what
    assert same_tensors(as_arrays(state_of(again.model)), as_arrays(state_of(whole.model))), what


def test_the_tests_notice() -> None:
    """Negative control: an error of ours that is not for the user, and one of two lines."""

    def defect() -> None:
        raise KeyError("x")

    def told() -> None:
        raise LutqatError("a\nb")

    with pytest.raises(KeyError):
        said(defect)
    assert said(told)[1:] == ("error: a b\n", 1)
