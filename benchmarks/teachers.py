"""What a made-up teacher says, as the capture hands it to the codec."""

from __future__ import annotations

from typing import Any

import numpy as np

from lib.cache.spec import CacheSpec, draw_negatives


def packed_spec(**changes: Any) -> CacheSpec:
    """Top-64 of 49,152 and no negatives, nine tokens a row."""
    values: dict[str, Any] = {
        "teacher": "teacher-a",
        "tokenizer": "tokenizer-a",
        "tokens": "tokens-a",
        "split": "train",
        "vocab_size": 49152,
        "max_length": 9,
        "top_k": 64,
        "negatives": 0,
        "temperatures": (1.0, 2.0),
        "seed": 3,
        "codec": "packed",
    }
    return CacheSpec(**{**values, **changes})


def zipf_logits(spec: CacheSpec, rows: int, seed: int = 0, crowded: bool = False) -> np.ndarray:
    """Logits ``[B, P, V]`` that fall like a power of the rank, with noise.

    Every other position has a first choice far above the rest, as text does. Ranks are spread over
    the vocabulary at random, which is the hardest case, or ``crowded`` at small ids.
    """
    generator = np.random.default_rng(seed)
    shape = (rows, spec.positions, spec.vocab_size)
    logits = np.empty(shape, dtype=np.float64)
    density = 1 / (np.arange(spec.vocab_size) + 100)
    for row, position in np.ndindex(shape[:2]):
        power = generator.uniform(0.9, 1.6)
        values = -power * np.log(np.arange(1, spec.vocab_size + 1))
        values += generator.normal(0, 0.3, spec.vocab_size) + 15
        if position % 2:
            values[0] += abs(generator.normal(0, 4))
        keys = generator.random(spec.vocab_size)
        order = (np.log(keys) / density if crowded else -keys).argsort()[::-1]
        logits[row, position, order] = values
    return logits


def columns_of(spec: CacheSpec, logits: np.ndarray, first: int = 0) -> dict[str, np.ndarray]:
    """Columns of codec ``raw``, log-probabilities float32, of logits ``[B, P, V]``.

    Args:
        first: number of the first row, which the negatives depend on.
    """
    rows = len(logits)

    def logsumexp(values: np.ndarray) -> np.ndarray:
        largest = values.max(axis=2, keepdims=True)
        return (largest + np.log(np.exp(values - largest).sum(axis=2, keepdims=True)))[:, :, 0]

    total = logsumexp(logits)
    logprobs = np.maximum(logits - total[:, :, None], -65504)
    ids = logprobs.argsort(axis=2, kind="stable")[:, :, ::-1][:, :, : spec.top_k]
    negatives = np.stack([draw_negatives(spec, first + row) for row in range(rows)])
    shared = np.broadcast_to(negatives[:, None], (rows, spec.positions, spec.negatives))
    scaled = [logsumexp(logprobs / t) for t in spec.temperatures]
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, spec.vocab_size, (rows, spec.max_length))
    return {
        "input_ids": tokens.astype(np.int32),
        "length": generator.integers(2, spec.max_length + 1, rows).astype(np.int32),
        "topk_ids": ids.astype(np.int32),
        "topk_logprobs": np.take_along_axis(logprobs, ids, axis=2).astype(np.float32),
        "negative_ids": negatives,
        "negative_logprobs": np.take_along_axis(logprobs, shared, axis=2).astype(np.float32),
        "logsumexp": total.astype(np.float32),
        "scaled_logsumexp": np.stack(scaled, axis=2).astype(np.float32)
        if scaled
        else np.empty((rows, spec.positions, 0), dtype=np.float32),
    }
