"""A tiny snapped model and token sequences for the gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.surgery import quantize_model
from lib.model.tiny import VOCABULARY, random_teacher
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm
from lib.snap.snap import snap_model


def linear_spec(**changes: Any) -> LinearSpec:
    """16 levels, rank 4, directional."""
    values: dict[str, Any] = {
        "lut_size": 16,
        "rank": 4,
        "group_size": 16,
        "scale": ScaleForm.DIRECTIONAL,
        "codebook": Codebook.UNIFORM,
    }
    return LinearSpec(**{**values, **changes})


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
