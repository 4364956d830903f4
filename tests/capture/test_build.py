"""The capture: right numbers, one cache however often it was killed, and clear refusals."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

import lib.capture.build as build
from lib.base.errors import CorruptError, InputError, MismatchError, NonFiniteError
from lib.cache.shards import CachedBatch, CacheReader, shard_name
from lib.cache.spec import draw_negatives
from lib.capture.build import cache_statistics
from tests.capture.tiny import (
    LENGTH,
    ROWS,
    VOCAB,
    build_tiny,
    tiny_config,
    tiny_llama,
    tiny_rows,
    tiny_spec,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cache, built in one go."""
    folder = tmp_path_factory.mktemp("whole")
    build_tiny(folder / "out", folder / "scratch")
    return folder / "out"


def everything(folder: Path) -> CachedBatch:
    reader = CacheReader(folder)
    return reader.batch(np.arange(len(reader)))


def slow_logprobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Full log-probabilities and log-sum-exp, a row at a time, without its padding."""
    rows, model = tiny_rows(), tiny_llama()
    logprobs = torch.zeros(ROWS, LENGTH - 1, VOCAB)
    logsumexp = torch.zeros(ROWS, LENGTH - 1)
    with torch.inference_mode():
        for row, length in enumerate(rows.lengths):
            ids = torch.from_numpy(rows.input_ids[row, :length]).long()[None]
            logits = model(ids).logits[0, : LENGTH - 1]
            usable = min(int(length), LENGTH - 1)
            logprobs[row, :usable] = logits.log_softmax(dim=1)
            logsumexp[row, :usable] = logits.logsumexp(dim=1)
    return logprobs, logsumexp


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- numbers ------------------------------------------------------------------------------------


def test_cache_says_what_the_teacher_says(whole: Path) -> None:
    batch, mask = everything(whole), everything(whole).mask
    logprobs, logsumexp = slow_logprobs()
    tolerance: dict[str, Any] = {"rtol": 2**-11, "atol": 1e-5}  # half precision, then float32
    top = logprobs.topk(8, dim=2)
    torch.testing.assert_close(batch.topk_logprobs[mask], top.values[mask], **tolerance)
    assert torch.equal(batch.topk_ids[mask], top.indices[mask])
    chosen = logprobs.gather(2, batch.negative_ids[:, None].expand(-1, LENGTH - 1, -1))
    torch.testing.assert_close(batch.negative_logprobs[mask], chosen[mask], **tolerance)
    torch.testing.assert_close(batch.logsumexp[mask], logsumexp[mask], rtol=1e-5, atol=1e-5)
    scaled = torch.stack([logprobs.logsumexp(2), (logprobs / 2).logsumexp(2)], dim=2)
    torch.testing.assert_close(batch.scaled_logsumexp[mask], scaled[mask], rtol=1e-5, atol=1e-5)


def test_rows_and_mask_are_the_tokens(whole: Path) -> None:
    rows, batch = tiny_rows(), everything(whole)
    np.testing.assert_array_equal(batch.input_ids.numpy(), rows.input_ids)
    np.testing.assert_array_equal(batch.mask.sum(dim=1).numpy(), rows.lengths - 1)
    assert not batch.mask[4].any()  # a single token predicts nothing
    assert torch.isfinite(batch.topk_logprobs).all()


def test_whole_vocabulary_as_top_k_is_the_log_softmax(tmp_path: Path) -> None:
    build_tiny(tmp_path / "out", tmp_path / "scratch", top_k=VOCAB, negatives=0)
    batch = everything(tmp_path / "out")
    full = torch.zeros(ROWS, LENGTH - 1, VOCAB)
    full.scatter_(2, batch.topk_ids, batch.topk_logprobs)
    logprobs, _ = slow_logprobs()
    torch.testing.assert_close(full[batch.mask], logprobs[batch.mask], rtol=2**-11, atol=1e-5)
    total = batch.topk_logprobs[batch.mask].exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=2**-10, atol=0)
    assert batch.negative_ids.shape == (ROWS, 0) and batch.negative_mask.shape[2] == 0


def test_head_in_chunks_is_the_head_at_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHUNK_BYTES", 4 * VOCAB * 5)  # five positions
    build_tiny(tmp_path / "out", tmp_path / "scratch")
    one, many = everything(whole), everything(tmp_path / "out")
    assert torch.equal(one.topk_ids[one.mask], many.topk_ids[one.mask])
    torch.testing.assert_close(one.logsumexp, many.logsumexp, rtol=1e-6, atol=1e-6)


def test_negatives_do_not_depend_on_batches_or_shards(whole: Path, tmp_path: Path) -> None:
    build_tiny(tmp_path / "out", tmp_path / "scratch", batch_size=5, shard_sequences=7)
    one, other = everything(whole), everything(tmp_path / "out")
    assert torch.equal(one.negative_ids, other.negative_ids)
    expected = np.stack([draw_negatives(tiny_spec(), row) for row in range(ROWS)])
    np.testing.assert_array_equal(one.negative_ids.numpy(), expected)
    torch.testing.assert_close(one.topk_logprobs, other.topk_logprobs, rtol=2**-10, atol=1e-5)


def test_statistics(whole: Path) -> None:
    batch = everything(whole)
    mass = float(batch.topk_logprobs.exp().sum(dim=2)[batch.mask].mean())
    found = cache_statistics(whole)
    assert found.pop("topk_mass") == pytest.approx(mass, abs=1e-5)
    assert found == {
        "sequences": ROWS,
        "tokens": int((tiny_rows().lengths - 1).sum()),
        "bytes_per_token": round(tiny_spec().bytes_per_token(), 1),
    }


# --- killed and resumed -------------------------------------------------------------------------


class Stopped(Exception):
    """Ends a build at a chosen place."""


def stop_after(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> list[int]:
    """Make the build raise at the given call of one of its functions; returns a call counter."""
    original, count = getattr(build, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > calls:
            raise Stopped
        return original(*args, **kwargs)

    monkeypatch.setattr(build, name, counted)
    return count


# 5 batches in 3 shards; an entry is written after each shard
@pytest.mark.parametrize(
    ("name", "calls", "left"),
    [
        ("capture_rows", 0, 5),
        ("capture_rows", 3, 3),  # inside the second shard: its first batch is done again
        ("capture_rows", 4, 1),
        ("write_shard", 1, 3),
        ("write_json", 1, 3),  # the second shard is there, but not its entry
        ("_publish", 0, 0),
    ],
)
def test_stopped_build_resumes_to_the_same_bytes(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    calls: int,
    left: int,
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, name, calls)
        with pytest.raises(Stopped):
            build_tiny(tmp_path / "out", tmp_path / "scratch")
    assert not (tmp_path / "out").exists()
    count = stop_after(monkeypatch, "capture_rows", 99)
    build_tiny(tmp_path / "out", tmp_path / "scratch")
    assert count == [left]
    assert files(tmp_path / "out") == files(whole)


def test_sigkilled_build_resumes_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    command = [sys.executable, "-m", "tests.capture.killed_build", str(scratch), str(out), "2"]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (scratch / shard_name(1)).exists() and not (scratch / shard_name(2)).exists()
    build_tiny(out, scratch)
    assert files(out) == files(whole)
    assert everything(out).input_ids.unique(dim=0).shape[0] == ROWS  # no duplicate, no gap


@pytest.mark.parametrize("number", [0, 1, 2])
def test_damaged_leftover_is_built_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, "_publish", 0)
        with pytest.raises(Stopped):
            build_tiny(tmp_path / "out", tmp_path / "scratch")
    path = tmp_path / "scratch" / shard_name(number)
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    count = stop_after(monkeypatch, "capture_rows", 99)
    build_tiny(tmp_path / "out", tmp_path / "scratch")
    assert count == [[2, 2, 1][number]]  # the batches of that shard alone
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.parametrize("changes", [{"seed": 9}, {"teacher": "other"}, {"shard_sequences": 2}])
def test_leftovers_of_another_build_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    build_tiny(tmp_path / "first", tmp_path / "scratch")
    count = stop_after(monkeypatch, "capture_rows", 99)
    build_tiny(tmp_path / "second", tmp_path / "scratch", **changes)
    assert count[0] >= 5
    build_tiny(tmp_path / "clean", tmp_path / "empty", **changes)
    assert files(tmp_path / "second") == files(tmp_path / "clean")


def test_finished_cache_replaces_the_old_and_outlives_the_scratch(
    whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("old")
    build_tiny(tmp_path / "out", tmp_path / "scratch")
    for path in (tmp_path / "scratch").iterdir():
        path.unlink()
    assert files(tmp_path / "out") == files(whole)


def test_published_where_links_are_impossible(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(build.os, "link", refuse)
    build_tiny(tmp_path / "out", tmp_path / "scratch")
    assert files(tmp_path / "out") == files(whole)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_name_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    hidden = build._hidden

    def spoiled(model: Any, ids: torch.Tensor) -> torch.Tensor:
        result = hidden(model, ids).clone()
        rows = torch.from_numpy(tiny_rows().input_ids).long()
        result[:, 2][(ids == rows[6]).all(dim=1)] = value
        return result

    with monkeypatch.context() as patch:
        patch.setattr(build, "check_head", lambda *_: None)
        patch.setattr(build, "_hidden", spoiled)
        with pytest.raises(NonFiniteError, match="row 6, position 2 of the train tokens"):
            build_tiny(tmp_path / "out", tmp_path / "scratch")
    assert (tmp_path / "scratch" / shard_name(0)).exists()  # finished work is kept
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_spoiled_logit_is_found(value: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, 13] = value
    part = build._read_logits(logits, torch.zeros(3, 0, dtype=torch.long), tiny_spec(negatives=0))
    assert part["finite"].tolist() == [True, False, True]


def test_spoiled_weight_is_not_taken_for_an_unknown_family(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[13] = float("nan")
    with pytest.raises(NonFiniteError, match="row 0, position 0"):
        build_tiny(tmp_path / "out", tmp_path / "scratch", model=model)


@pytest.mark.parametrize(
    ("config", "family", "changes"),
    [
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 1.0, "head_dim": 8}),
    ],
)
def test_families_that_transform_their_logits_are_refused(
    tmp_path: Path, config: type, family: Any, changes: dict[str, Any]
) -> None:
    model = family(tiny_config(config, **changes)).eval()
    with pytest.raises(InputError, match=rf"{family.__name__} transforms its logits"):
        build_tiny(tmp_path / "out", tmp_path / "scratch", model=model)


def test_mismatched_inputs_are_refused(tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            build_tiny(tmp_path / "out", tmp_path / "scratch", **changes)

    refused(MismatchError, "97 logits, the cache asks 98", vocab_size=98)
    refused(MismatchError, "12 per row, the cache asks 13", max_length=13)
    for key, name in {"tokens": "fingerprint", "tokenizer": "tokenizer", "split": "split"}.items():
        rows = tiny_rows()
        rows.meta[name] = "another"
        refused(MismatchError, f"have {key} another, the cache is to have", rows=rows)
    rows = tiny_rows()
    rows.input_ids[3, 3] = VOCAB
    refused(MismatchError, "tokens go from 0 to 97.*vocabulary has 97", rows=rows)
    rows = tiny_rows()
    rows.lengths[3] = 0
    refused(CorruptError, "rows of 0 to 12 tokens", rows=rows)
    rows = tiny_rows()
    rows.input_ids, rows.lengths = rows.input_ids[:0], rows.lengths[:0]
    refused(InputError, "no token rows", rows=rows)
    assert not (tmp_path / "out").exists()
