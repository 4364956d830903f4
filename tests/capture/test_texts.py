"""Small caches from lists of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.base.errors import InputError
from lib.cache.shards import CacheReader
from lib.capture.texts import cache_texts, hold_out
from lib.model.tiny import random_teacher
from lib.params.data import Cache

SETTINGS = Cache(top_k=32, negatives=8, shard_sequences=4)


def test_texts_are_held_out_whole_and_once() -> None:
    texts = [f"text {number}" for number in range(20)] * 2 + ["  "]
    parts = hold_out(texts, 0.2)
    assert sorted(parts["train"] + parts["val"]) == sorted(set(texts[:20]))
    assert len(parts["val"]) == 4
    assert parts["val"] == ["text 2", "text 7", "text 12", "text 17"]
    assert [len(part) for part in hold_out(["a", "b"], 0.01).values()] == [1, 1]
    assert [len(part) for part in hold_out(["a", "b"], 1.0).values()] == [1, 1]
    with pytest.raises(InputError, match="1 different texts"):
        hold_out(["a", "a", ""], 0.1)


def build(folder: Path, texts: list[str]) -> None:
    model, tokenizer = random_teacher("llama", seed=0)
    cache_texts(
        model,
        tokenizer,
        texts,
        folder,
        teacher_mark="teacher",
        settings=SETTINGS,
        max_length=16,
        val_fraction=0.25,
        device=torch.device("cpu"),
    )


def test_rows_hold_the_texts_and_the_teacher(tmp_path: Path) -> None:
    texts = [f"This is the text with number {number}." for number in range(8)]
    build(tmp_path, texts)
    model, tokenizer = random_teacher("llama", seed=0)
    reader = CacheReader(tmp_path / "train", {"teacher": "teacher", "vocab_size": 288})
    ids, lengths = reader.sequences(99)
    joined = [int(i) for row, n in zip(ids, lengths, strict=True) for i in row[:n]]
    expected = [i for t in hold_out(texts, 0.25)["train"] for i in (*tokenizer(t)["input_ids"], 2)]
    assert tokenizer.eos_token_id == 2
    assert joined == expected
    held = CacheReader(tmp_path / "val")
    batch = held.batch(torch.arange(2).numpy())
    with torch.no_grad():
        logprobs = model(input_ids=batch.input_ids).logits[:, :-1].log_softmax(dim=-1)
    found = logprobs.gather(2, batch.topk_ids)
    assert torch.allclose(found, batch.topk_logprobs, atol=2e-2)


def test_too_short_texts(tmp_path: Path) -> None:
    _, tokenizer = random_teacher("llama", seed=0)
    assert len(tokenizer("a")["input_ids"]) == 1  # with the end token a row of two: just enough
    build(tmp_path, ["a", "b"])
    assert len(CacheReader(tmp_path / "train")) == 1
