"""Models of real shapes with random weights, and cached targets for them: speed needs no more."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lib.cache.shards import CachedBatch

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN3_0_6B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


def random_model(shape: str) -> PreTrainedModel:
    """``smollm2-135m`` or ``qwen3-0.6b``, float32, seeded."""
    torch.manual_seed(0)
    if shape == "smollm2-135m":
        return LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).float()
    if shape == "qwen3-0.6b":
        return Qwen3ForCausalLM(Qwen3Config(**QWEN3_0_6B)).float()
    raise ValueError(f"unknown shape {shape}")


def random_batch(
    vocabulary: int, sequences: int, length: int, *, top_k: int, negatives: int
) -> CachedBatch:
    """Targets of the default cache's form; no padding."""
    generator = torch.Generator().manual_seed(1)
    positions = length - 1

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, shape, generator=generator)

    def logprobs(*shape: int) -> torch.Tensor:
        return -8 + torch.randn(*shape, generator=generator)

    return CachedBatch(
        input_ids=ids(sequences, length),
        mask=torch.ones(sequences, positions, dtype=torch.bool),
        topk_ids=ids(sequences, positions, top_k),
        topk_logprobs=logprobs(sequences, positions, top_k).sort(descending=True).values,
        negative_ids=ids(sequences, negatives),
        negative_logprobs=logprobs(sequences, positions, negatives) - 4,
        negative_mask=torch.ones(sequences, positions, negatives, dtype=torch.bool),
        logsumexp=torch.full((sequences, positions), 10.0),
        scaled_logsumexp=torch.zeros(sequences, positions, 2),
    )
