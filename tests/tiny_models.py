"""Tiny models of several families, their quantized forms, and teacher caches for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lib.cache.shards import CacheReader
from lib.capture.build import build_cache
from lib.model.load import folder_fingerprint
from lib.model.surgery import quantize_model
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm
from tests.capture.tiny import LENGTH, PAD, VOCAB, Rows, tiny_config, tiny_spec

CPU = torch.device("cpu")
SAMPLED = ("targets", "samples", "sample_temperature", "sample_power")
FAMILIES: dict[str, Any] = {
    "llama": lambda: tiny_config(LlamaConfig),
    "qwen3": lambda: tiny_config(Qwen3Config, head_dim=8, tie_word_embeddings=True),
    "qwen2": lambda: tiny_config(Qwen2Config),  # q, k and v have biases
}


def linear_spec(**changes: Any) -> LinearSpec:
    """16 levels, rank 4, groups of 16, directional."""
    values: dict[str, Any] = {
        "lut_size": 16,
        "rank": 4,
        "group_size": 16,
        "scale": ScaleForm.DIRECTIONAL,
        "codebook": Codebook.UNIFORM,
    }
    return LinearSpec(**{**values, **changes})


def model_spec(**changes: Any) -> ModelSpec:
    """MLPs and attention alike."""
    spec = linear_spec(**changes)
    return ModelSpec(mlp=spec, attention=spec)


def tiny_model(family: str = "llama", seed: int = 5) -> PreTrainedModel:
    """The same random model every time: hidden 32, two layers, vocabulary of 97."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # Transformers starts them at 0
                parameter.normal_()
    return model.eval()


def quantized(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """The tiny model, quantized."""
    model = tiny_model(family)
    quantize_model(model, model_spec(**changes))
    model.requires_grad_(False)
    return model


def random_rows(count: int, split: str, seed: int) -> Rows:
    """Token rows, every fourth one padded."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, VOCAB, (count, LENGTH)).astype(np.int32)
    lengths = np.full(count, LENGTH, dtype=np.int32)
    lengths[::4] = LENGTH // 2
    ids[np.arange(LENGTH) >= lengths[:, None]] = PAD
    return Rows(ids, lengths, {"split": split, "fingerprint": "rows", "tokenizer": "none"})


def make_caches(
    folder: Path, model: PreTrainedModel | None = None, rows: int = 64, **changes: Any
) -> Path:
    """``folder/train`` and ``folder/val``: what the model says about random tokens; only train is
    ever sampled."""
    for seed, split in enumerate(("train", "val")):
        if split == "val":
            changes = {key: value for key, value in changes.items() if key not in SAMPLED}
        build_cache(
            model or tiny_model(),
            random_rows(rows if split == "train" else 16, split, seed),  # type: ignore[arg-type]
            tiny_spec(split=split, **changes),
            folder / split,
            folder / f"scratch-{split}",
            batch_size=8,
            shard_sequences=8,
            device=CPU,
        )
    return folder


def make_place(folder: Path, **changes: Any) -> Path:
    """``folder/teacher``, the tiny model as the stage teacher leaves it, and ``folder/cache``."""
    tiny_model().save_pretrained(folder / "teacher")
    (folder / "teacher/tokenizer.json").write_text("{}")
    mark = folder_fingerprint(folder / "teacher")
    make_caches(folder / "cache", teacher=mark, **changes)
    return folder


def readers(folder: Path) -> tuple[CacheReader, CacheReader]:
    """Train and val."""
    return CacheReader(folder / "train"), CacheReader(folder / "val")


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names and equal values, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits on fixed tokens."""
    ids = torch.from_numpy(random_rows(3, "train", 7).input_ids).long()
    return model(input_ids=ids).logits
