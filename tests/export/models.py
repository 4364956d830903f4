"""Snapped tiny models and the packages made of them, each made once per run of the tests."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.export.coreml import save_package
from lib.export.gate import calls
from lib.export.graph import DeployedDecoder, join_logits, step_inputs
from lib.model.surgery import quantized_layers
from lib.quant.spec import Codebook, ScaleForm
from lib.snap.snap import snap_model
from tests.tiny_models import quantized

SLOTS = 16
TOKENS = 8
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
"""Eleven tokens: one prefill of eight, three single steps."""


KINDS: list[dict[str, Any]] = [
    {"baked": True},
    {"scale": ScaleForm.LOWRANK},
    {"lut_size": 16, "codebook": Codebook.KMEANS},
    {"lut_size": 2},
    {"scale": ScaleForm.GROUP, "group_size": 20},  # 32 inputs: the second group is short
    {"scale": ScaleForm.GROUP, "group_size": 100},  # one group
    {"scale": ScaleForm.CHANNEL, "codebook": Codebook.BALANCED},
]


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


@torch.no_grad()
def graph_logits(decoder: DeployedDecoder, ids: list[int], tokens: int) -> torch.Tensor:
    """``[N, V]`` from the static graph, called as a package is."""
    cache = decoder.empty_cache()
    rows = []
    for start, count in calls(len(ids), tokens):
        given = step_inputs(ids[start : start + count], start, count, decoder.slots)
        *logits, keys, values = decoder(**given.named(), keys=cache[0], values=cache[1])
        cache = (keys, values)
        rows.append(join_logits({f"logits_{n}": part for n, part in enumerate(logits)}))
    return torch.cat(rows)


def decoder(family: str = "qwen3", **changes: Any) -> DeployedDecoder:
    """The static graph of such a model."""
    return DeployedDecoder(snapped(family, **changes), SLOTS)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def package(family: str = "qwen3", target: Any = "iOS18", **changes: Any) -> Path:
    """A package on disk, made once; copy it before changing it."""
    return _package(family, target, tuple(changes.items()))


@cache
def _package(family: str, target: Any, changes: tuple[tuple[str, Any], ...]) -> Path:
    name = "-".join([family, target, *(str(value) for _, value in changes)])
    out = Path(_folder().name, f"{name}.mlpackage")
    made = {key: value for key, value in changes if key != "head"}  # that one is a name only
    save_package(decoder(family, **made), out, tokens=TOKENS, target=target)
    return out
