"""A tiny snapped model and token sequences for the gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.surgery import quantize_model
from lib.model.tiny import VOCABULARY, random_teacher
from lib.quant.spec import ModelSpec
from lib.snap.snap import snap_model
from tests.tiny_models import linear_spec


def snapped_model(kind: str = "llama", *, baked: bool = False, **changes: Any) -> PreTrainedModel:
    """The tiny teacher, quantized and snapped without training."""
    model, _ = random_teacher(kind, seed=0)
    spec = linear_spec(**changes)
    quantize_model(model, ModelSpec(mlp=spec, attention=spec))
    snap_model(model, baked=baked)
    return model.eval()


def token_sequences(count: int = 2, length: int = 24) -> list[Tensor]:
    """Random token ids, the same every time; sequences differ in length."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCABULARY - 30, (length - i,), generator=generator) for i in range(count)
    ]
