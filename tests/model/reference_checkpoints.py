"""Checkpoints as the reference implementation writes them, and what its forward pass multiplies
with: slow, entry by entry, from its published semantics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.surgery import projections
from lib.model.tiny import random_teacher

GROUP = 24  # does not divide 64 or 160: V1 pads its scales
Tensors = dict[str, Tensor]


def save_base(folder: Path) -> PreTrainedModel:
    """A tiny Llama and its tokenizer as a Hugging Face folder."""
    model, tokenizer = random_teacher("llama", seed=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def uniform(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float16).float()


def v1_layer(weight: Tensor, generator: torch.Generator, lut: Tensor, rank: int = 3) -> Tensors:
    """Trained V1 tensors; the scales of one row are below zero in a few places."""
    rows, columns = weight.shape
    padded = columns + (-columns) % GROUP
    a = torch.rand(rows, rank, generator=generator) * 0.3
    b = torch.rand(rank, padded, generator=generator) + 0.1
    b[0, :5] = -9.0
    a[:, 0] = 0
    a[rows // 2, 0] = 0.2
    return {"weight": weight.clone(), "scale_A": a, "scale_B": b, "lut": lut.clone()}


def v1_weight(t: Tensors, mode: str | None = None) -> Tensor:
    """W_q of V1, row by row."""
    lut, weight = t["lut"].float(), t["weight"].float()
    columns, size = weight.shape[1], t["lut"].numel()
    scale = (t["scale_A"].float() @ t["scale_B"].float()[:, :columns]).clamp(min=1e-8)
    if mode == "baked":
        return weight
    if mode == "lut":
        return weight * scale
    result = torch.empty_like(weight)
    for row in range(len(weight)):
        x = (weight[row] / scale[row]).clamp(-1, 1)
        index = torch.round((x + 1.0) / (2.0 / (size - 1))).long()
        if 0.0 in lut.tolist():
            half = size // 2
            below, above = (x + 1.0) / (1.0 / half), x / (1.0 / (half - 1)) + half
            index = torch.round(torch.where(x < 0, below, above)).long()
        result[row] = lut[index.clamp(0, size - 1)] * scale[row]
    return result


def v2_layer(weight: Tensor, generator: torch.Generator, lut: Tensor, rank: int = 4) -> Tensors:
    """Trained V2 tensors: raw directions of any sign and length, magnitudes, no frozen indices."""
    rows, columns = weight.shape
    return {
        "weight": weight.clone(),
        "scale_A": torch.randn(rows, rank, generator=generator) * 3,
        "scale_B": torch.randn(rank, columns, generator=generator),
        "rank_magnitude": torch.rand(rank, generator=generator) * 8 - 1,
        "lut": lut.clone(),
        "_scales_baked_flag": torch.tensor(0, dtype=torch.int8),
    }


def v2_factors(t: Tensors, config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(A_dir, B_dir, g), or the parameters themselves once they are baked."""
    a, b, g = t["scale_A"].float(), t["scale_B"].float(), t["rank_magnitude"].float()
    if t.get("_scales_baked_flag", torch.tensor(0)).item():
        return a, b, g
    if config.get("force_positive_scales"):
        a, b = a.abs(), b.abs()
    if config.get("magnitude_activation") == "softplus":
        g = torch.log1p(torch.exp(g))
    a = a / a.norm(dim=0, keepdim=True).clamp(min=1e-6)
    return a, b / b.norm(dim=1, keepdim=True).clamp(min=1e-6), g + (1e-6)


def v2_indices(t: Tensors, config: dict[str, Any]) -> Tensor:
    """Nearest LUT entry of W / S by the full table of distances."""
    a, b, g = v2_factors(t, config)
    x = (t["weight"].float() / ((a * g) @ b)).clamp(float(t["lut"].min()), float(t["lut"].max()))
    return (x[..., None] - t["lut"].float()).abs().argmin(dim=-1)


def v2_weight(t: Tensors, config: dict[str, Any] | None = None) -> Tensor:
    """W_q of V2: the columns of the identity sent through its rank-by-rank forward pass."""
    a, b, g = v2_factors(t, config or {})
    if "_indices" in t:
        q = t["lut"].float()[t["_indices"].long()]
    elif "_Q" in t:
        q = t["_Q"].float()
    else:
        q = t["lut"].float()[v2_indices(t, config or {})]
    if t.get("_scales_baked_flag", torch.tensor(0)).item():
        g = g * 1.0
    x = torch.eye(q.shape[1])
    y = sum((g[k] * a[:, k]) * ((x * b[k]) @ q.T) for k in range(len(g)))
    assert isinstance(y, Tensor)
    return y.T


def state_dict(model: PreTrainedModel, make: Any, lut: Tensor, seed: int = 0) -> Tensors:
    """A whole state dict whose projections are made by ``make(weight, generator, lut)``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in projections(model).items():
        weight = tensors.pop(f"{name}.weight")
        assert weight.shape == module.weight.shape
        layer = make(weight, generator, lut)
        tensors.update({f"{name}.{key}": value for key, value in layer.items()})
    return tensors


def layer_of(tensors: Tensors, name: str) -> Tensors:
    """The tensors of one layer."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
