"""A tiny snapped model and token sequences for the gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.ane.products import Mode
from lib.ane.spec import CheckSpec, Limits
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


def check_spec(max_kl: float = 0.02, min_top1: float = 0.85, **changes: Any) -> CheckSpec:
    """A check that a sound tiny model passes, in mode wide only unless told otherwise."""
    values: dict[str, Any] = {"modes": (Mode.WIDE,), **changes}
    return CheckSpec(limits=Limits(max_kl=max_kl, min_top1=min_top1), **values)


def with_large_residual() -> PreTrainedModel:
    """A model whose residual stream passes 255 (but not 65504) from the embedding on."""
    model = snapped_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1024.0)
    return model
