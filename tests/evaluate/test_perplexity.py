"""Sliding-window perplexity against one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lib.base.errors import InputError
from lib.evaluate.perplexity import perplexity, plan_windows
from lib.model.tiny import random_teacher


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_teacher("llama", seed=0)[0]


def _stream(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, tokens).astype(np.int32)


def _one_token_at_a_time(
    model: PreTrainedModel, stream: np.ndarray, window: int, stride: int
) -> float:
    """Each token from its own forward pass: context from its window's start up to it."""
    total = 0.0
    for position in range(1, len(stream)):
        start = 0
        while start + window <= position:
            start += stride
        start = min(start, position - 1)
        context = torch.from_numpy(stream[start:position].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=context).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[int(stream[position])])
    return math.exp(total / (len(stream) - 1))


@pytest.mark.parametrize(
    ("tokens", "window", "stride"),
    [(60, 16, 8), (61, 16, 8), (40, 16, 5), (33, 8, 1), (40, 64, 32), (2, 16, 8), (16, 16, 8)],
)
def test_equals_the_slow_reference(
    model: PreTrainedModel, tokens: int, window: int, stride: int
) -> None:
    stream = _stream(tokens)
    expected = _one_token_at_a_time(model, stream, window, stride)
    assert perplexity(model, stream, window, stride) == pytest.approx(expected, rel=1e-4)


def test_window_and_stride_matter(model: PreTrainedModel) -> None:
    """Otherwise the comparison above would hold for any windowing."""
    values = {perplexity(model, _stream(60), w, s) for w, s in [(16, 8), (16, 16), (8, 8), (64, 8)]}
    assert len(values) == 4


@given(
    tokens=st.integers(2, 400), window=st.integers(2, 80), share=st.floats(0, 1, exclude_min=True)
)
def test_every_token_is_scored_once_with_enough_context(
    tokens: int, window: int, share: float
) -> None:
    stride = max(1, round(window * share))
    windows = plan_windows(tokens, window, stride)
    scored = [position for w in windows for position in range(w.first, w.end)]
    assert scored == list(range(1, tokens))
    for w in windows:
        assert w.end - w.start <= window
        assert w.start < w.first
    for w in windows[1:]:
        assert w.first - w.start >= max(1, min(window - stride, w.first))


def test_batching_changes_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _stream(200)
    together = perplexity(model, stream, 16, 8)
    monkeypatch.setattr("lib.evaluate.perplexity.TOKENS_PER_BATCH", 1)
    assert perplexity(model, stream, 16, 8) == pytest.approx(together, rel=1e-5)


def test_a_destroyed_model_is_infinite_not_clamped() -> None:
    model, _ = random_teacher("llama", seed=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    assert perplexity(model, _stream(50), 16, 8) == math.inf


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(1, 8, 4), (9, 8, 0), (9, 8, 9), (9, 1, 1)]
)
def test_impossible_windows(tokens: int, window: int, stride: int) -> None:
    with pytest.raises(InputError):
        plan_windows(tokens, window, stride)
