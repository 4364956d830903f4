"""Snapped tiny models and the packages made of them, each made once per run of the tests."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.export.coreml import save_package
from lib.export.graph import DeployedDecoder
from lib.model.surgery import quantized_layers
from lib.snap.snap import snap_model
from tests.tiny_models import quantized

SLOTS = 16
TOKENS = 8
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
"""Eleven tokens: one prefill of eight, three single steps."""


def snapped(family: str = "qwen3", *, baked: bool = False, **changes: Any) -> PreTrainedModel:
    """A tiny model with scales as training leaves them, snapped."""
    values: dict[str, Any] = {"lut_size": 4, "rank": 4, **changes}
    model = quantized(family, **values)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            for parameter in layer.scale.parameters():
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
            layer.refresh_indices()
    snap_model(model, baked=baked)
    return model


def decoder(family: str = "qwen3", **changes: Any) -> DeployedDecoder:
    """The static graph of such a model."""
    return DeployedDecoder(snapped(family, **changes), SLOTS)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def package(family: str = "qwen3", target: Any = "iOS18") -> Path:
    """A package on disk; copy it before changing it."""
    return _package(family, target)


@cache
def _package(family: str, target: Any) -> Path:
    out = Path(_folder().name, f"{family}-{target}.mlpackage")
    save_package(decoder(family), out, tokens=TOKENS, target=target)
    return out
