"""Snapped models to export as checkpoints, and the folders that they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.model.linear import LutLinear
from lib.model.surgery import quantized_layers
from lib.model.tiny import byte_tokenizer
from lib.snap.snap import snap_model
from tests.tiny_models import quantized, tiny_model

EPS = torch.finfo(torch.float32).eps


def snapped(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny model as the snap stage leaves it; so little training that no scale turns negative."""
    model = quantized(family, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            for parameter in layer.scale.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.003 * noise)
    snap_model(model, baked=False)
    return model


def save_base(folder: Path, family: str = "llama") -> Path:
    """The unquantized model and a tokenizer as a Hugging Face folder."""
    tiny_model(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rounding(layer: LutLinear) -> torch.Tensor:
    """A few float32 roundings of the sum over ranks that gives each entry of W_q."""
    a, b = layer.factors()
    return 16 * EPS * (a.abs() @ b.abs()) * float(layer.levels().abs().max())
