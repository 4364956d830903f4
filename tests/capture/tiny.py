"""A tiny random Llama, a few token rows, and a build of their cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.cache.spec import CacheSpec
from lib.capture.build import build_cache

VOCAB, LENGTH, ROWS = 97, 12, 11
PAD = 0


@dataclasses.dataclass
class Rows:
    """What the build needs of a token set."""

    input_ids: np.ndarray
    lengths: np.ndarray
    meta: dict[str, Any]


def tiny_config(kind: type = LlamaConfig, **changes: Any) -> Any:
    """Configuration of a two-layer model; ``kind`` picks the family."""
    return kind(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        initializer_range=0.3,  # large enough that the logits are not flat
        **changes,
    )


def tiny_llama() -> LlamaForCausalLM:
    """The same random model every time."""
    torch.manual_seed(5)
    return LlamaForCausalLM(tiny_config()).eval()


def tiny_rows() -> Rows:
    """Token rows, some of them padded, one of a single token."""
    generator = np.random.default_rng(1)
    ids = generator.integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    lengths = np.full(ROWS, LENGTH, dtype=np.int32)
    lengths[[1, 4, 10]] = (5, 1, 9)
    ids[np.arange(LENGTH) >= lengths[:, None]] = PAD
    return Rows(ids, lengths, {"split": "train", "fingerprint": "rows", "tokenizer": "none"})


def tiny_spec(**changes: Any) -> CacheSpec:
    """The spec of the tiny cache."""
    values: dict[str, Any] = {
        "teacher": "tiny",
        "tokenizer": "none",
        "tokens": "rows",
        "split": "train",
        "vocab_size": VOCAB,
        "max_length": LENGTH,
        "top_k": 8,
        "negatives": 16,
        "temperatures": (1.0, 2.0),
        "seed": 0,
    }
    return CacheSpec(**{**values, **changes})


def build_tiny(out: Path, scratch: Path, **changes: Any) -> None:
    """Build the tiny cache: shards of 4, 4 and 3 rows, batches of 3, 1, 3, 1 and 3."""
    sizes = {"batch_size": 3, "shard_sequences": 4}
    sizes |= {key: changes.pop(key) for key in list(changes) if key in sizes}
    torch.set_num_threads(1)
    build_cache(
        changes.pop("model", None) or tiny_llama(),
        changes.pop("rows", None) or tiny_rows(),  # type: ignore[arg-type]
        tiny_spec(**changes),
        out,
        scratch,
        **sizes,
        device=torch.device("cpu"),
    )
