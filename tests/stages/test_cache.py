"""The cache stage as DVC runs it: on disk, from params.yaml, killed between its splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lib.capture.build as build
import stages.cache
from lib.base.errors import MismatchError, ParamsError
from lib.cache.sampled import SampledBatches
from lib.cache.shards import CacheReader
from lib.model.load import folder_fingerprint, tokenizer_fingerprint
from lib.model.teacher import bring_teacher
from lib.params.load import read_yaml
from lib.text.sequences import TokenSet, write_tokens

ROWS = {"train": 10, "val": 3}
LENGTH = 16
PARAMS = Path(__file__).parents[2] / "params.yaml"
DVC = "stages: {cache: {cmd: none, params: [cache]}}"
ARGUMENTS = (Path("teacher"), Path("tokens"), Path("cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "teacher"
    bring_teacher("random:llama", None, 0, folder)
    return folder


def write_params(negatives: int, **changes: int | str) -> None:
    sizes = {"top_k": 32, "negatives": negatives, "batch_size": 2, "shard_sequences": 4}
    sections = {
        **read_yaml(PARAMS),
        "cache": {**sizes, **changes},
        "run": {"device": "cpu", "threads": 1},
    }
    Path("params.yaml").write_text(json.dumps(sections))


def write_split(split: str, tokenizer: str) -> None:
    generator = np.random.default_rng(len(split))
    ids = generator.integers(3, 250, (ROWS[split], LENGTH)).astype(np.int32)
    lengths = generator.integers(2, LENGTH + 1, ROWS[split]).astype(np.int32)
    about = {"split": split, "vocab_size": 259, "pad_id": 0, "tokenizer": tokenizer}
    write_tokens(Path("tokens", split), ids, lengths, **about)


@pytest.fixture
def workspace(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the stage in; its tokens have no test split, so opening it would fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    Path("teacher").symlink_to(teacher)
    for split in ROWS:
        write_split(split, tokenizer_fingerprint(teacher))
    write_params(negatives=8)
    Path("dvc.yaml").write_text(DVC)
    return tmp_path


def test_stage_writes_both_caches_and_metrics(workspace: Path) -> None:
    stages.cache.main(*ARGUMENTS)
    for split, rows in ROWS.items():
        tokens = TokenSet(Path("tokens", split))
        expect = {
            "teacher": folder_fingerprint(Path("teacher")),
            "tokens": tokens.meta["fingerprint"],
            "split": split,
        }
        reader = CacheReader(Path("cache", split), expect)
        batch = reader.batch(np.arange(rows))
        np.testing.assert_array_equal(batch.input_ids.numpy(), tokens.input_ids)
        np.testing.assert_array_equal(batch.mask.sum(dim=1).numpy(), tokens.lengths - 1)
    metrics = json.loads(Path("cache/metrics.json").read_text())["cache"]
    assert 0 < metrics.pop("topk_mass") < 1
    lengths = {split: TokenSet(Path("tokens", split)).lengths for split in ROWS}
    assert metrics == {
        "sequences": 10,
        "tokens": int((lengths["train"] - 1).sum()),
        "bytes_per_token": pytest.approx(reader.spec.bytes_per_token(), abs=0.05),
        "val_sequences": 3,
        "val_tokens": int((lengths["val"] - 1).sum()),
    }
    assert [path.suffix for path in Path(".ckpt/cache").iterdir()] == [".lock"]


def test_fewer_train_sequences_on_request(workspace: Path) -> None:
    """The first ones, with the numbers that they have in the whole cache."""
    stages.cache.main(*ARGUMENTS)
    whole = CacheReader(Path("cache/train")).batch(np.arange(6))
    write_params(negatives=8, train_sequences=6)
    stages.cache.main(*ARGUMENTS)
    part = CacheReader(Path("cache/train"))
    assert len(part) == 6 and len(CacheReader(Path("cache/val"))) == ROWS["val"]
    found = part.batch(np.arange(6))
    for name in ("input_ids", "mask", "topk_ids", "topk_logprobs", "negative_ids"):
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name


def test_packed_on_request(workspace: Path) -> None:
    write_params(negatives=8, codec="packed", level_bits=4)
    stages.cache.main(*ARGUMENTS)
    reader = CacheReader(Path("cache/train"), {"codec": "packed", "level_bits": 4})
    assert reader.spec.columns().keys() >= {"records", "negative_levels"}
    assert reader.batch(np.arange(10)).topk_ids.shape == (10, LENGTH - 1, 32)


def test_sampled_on_request(workspace: Path) -> None:
    """The train split; held-out text keeps its top k, with the same bytes as without."""
    stages.cache.main(*ARGUMENTS)
    before = Path("cache/val/shard-00000.arrow").read_bytes()
    write_params(negatives=8, targets="sampled", samples=20)
    stages.cache.main(*ARGUMENTS)
    reader = CacheReader(Path("cache/train"), {"targets": "sampled", "samples": 20})
    assert SampledBatches(reader).batch(np.arange(10)).weights.shape == (10, LENGTH - 1, 20)
    assert Path("cache/val/shard-00000.arrow").read_bytes() == before
    metrics = json.loads(Path("cache/metrics.json").read_text())["cache"]
    assert 0 < metrics["sampled_mass"] < 1 and "topk_mass" not in metrics


def test_stage_stopped_between_its_splits_keeps_the_first(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cache, built = stages.cache.build_cache, []

    def stop_at_val(model: Any, tokens: Any, spec: Any, *rest: Any, **sizes: Any) -> None:
        if spec.split == "val":
            raise KeyboardInterrupt
        build_cache(model, tokens, spec, *rest, **sizes)

    with monkeypatch.context() as patch:
        patch.setattr(stages.cache, "build_cache", stop_at_val)
        with pytest.raises(KeyboardInterrupt):
            stages.cache.main(*ARGUMENTS)
    shard = Path("cache/train/shard-00000.arrow")
    first = shard.read_bytes()
    shard.unlink()  # as DVC deletes the outputs before it runs a stage again

    def count(model: Any, tokens: Any, spec: Any, start: int, stop: int) -> Any:
        built.append(spec.split)
        return capture_rows(model, tokens, spec, start, stop)

    capture_rows = build.capture_rows
    monkeypatch.setattr(build, "capture_rows", count)
    stages.cache.main(*ARGUMENTS)
    assert built == ["val"] * 2
    assert shard.read_bytes() == first


def test_tokens_of_another_tokenizer_are_refused(workspace: Path) -> None:
    write_split("val", "another")
    with pytest.raises(MismatchError, match="val tokens have tokenizer another"):
        stages.cache.main(*ARGUMENTS)


def test_more_negatives_than_the_vocabulary_has_are_refused(workspace: Path) -> None:
    write_params(negatives=257)
    with pytest.raises(ParamsError, match=r"cache.negatives = 257.*use 0 to 256"):
        stages.cache.main(*ARGUMENTS)
    assert not Path("cache").exists()
