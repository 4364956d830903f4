"""The deployable form of a trained model: FP16 LUTs and scales, packed indices, no masters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import GateError, InputError
from lib.model.linear import (
    ChannelScale,
    DirectionalScale,
    GroupScale,
    LowRankScale,
    LutLinear,
    Scale,
)
from lib.model.surgery import bake, quantized_layers, replace_module


def _half(values: Tensor, name: str) -> Tensor:
    rounded = values.detach().half().float()
    if not rounded.isfinite().all():
        raise GateError(
            f"{name} holds {float(values.abs().max()):.3g}, which FP16 cannot (65504 at most); "
            "train with quant.ste_fp16: true, which shows it in the loss"
        )
    return rounded


def _check_layer(layer: LutLinear, name: str) -> None:
    if int(layer.indices.max()) >= layer.spec.lut_size:
        raise GateError(
            f"{name} has index {int(layer.indices.max())}, its LUT has {layer.spec.lut_size} "
            "entries; the checkpoint is damaged, rerun its stage"
        )
    if layer.levels().half().unique().numel() != layer.spec.lut_size:
        raise GateError(
            f"{name} has LUT entries that are equal in FP16; use codebook uniform, or a lower "
            "rates.lut"
        )


def _snapped_scale(layer: LutLinear, name: str) -> Scale:
    scale = layer.scale
    if isinstance(scale, LowRankScale):
        return LowRankScale(_half(scale.a, f"{name}.scale.a"), _half(scale.b, f"{name}.scale.b"))
    if isinstance(scale, GroupScale):
        return GroupScale(_half(scale.s, f"{name}.scale.s"), scale.members)
    if isinstance(scale, ChannelScale):
        product = _half(scale.s * scale.f, f"{name}.scale.s")  # what the device multiplies by
        return ChannelScale(product, torch.ones_like(scale.f), layer.in_features)
    a, b, g = scale.directions(ste_fp16=True)
    parts = (_half(a, f"{name}.scale.a"), _half(b, f"{name}.scale.b"), _half(g, f"{name}.scale.g"))
    return DirectionalScale(*parts, normalized=True)


@torch.no_grad()
def snap_layer(layer: LutLinear, name: str) -> LutLinear:
    """The same layer with FP16-exact LUT and scales and without master weight.

    A layer trained with ``ste_fp16`` computes bit for bit the same afterwards.

    Raises:
        GateError: a value exceeds FP16, LUT entries coincide, or an index is out of range.
    """
    _check_layer(layer, name)
    bias = None if layer.bias is None else _half(layer.bias, f"{name}.bias")
    lut = _half(layer.lut, f"{name}.lut")
    return LutLinear(layer.spec, _snapped_scale(layer, name), lut, layer.indices, None, bias)


@torch.no_grad()
def snap_model(model: PreTrainedModel, *, baked: bool) -> dict[str, Any]:
    """Snap every quantized layer in place; with ``baked`` replace it by its FP16 weight.

    Returns:
        ``layers`` and ``largest_change``: the largest |W_q after - W_q before| over all layers
        (0 after training with ``ste_fp16``, unless baked).

    Raises:
        InputError: there is nothing to snap. GateError: see :func:`snap_layer`.
    """
    layers = quantized_layers(model)
    if not layers:
        raise InputError("the checkpoint has no quantized layer to snap; give a trained one")
    largest = 0.0
    for name, layer in layers.items():
        snapped = snap_layer(layer, name)
        after = snapped.dequantized()
        if baked:
            after = _half(after, name)
        largest = max(largest, float((after - layer.dequantized()).abs().max()))
        replace_module(model, name, snapped)
    for name, parameter in model.named_parameters():
        parameter.copy_(_half(parameter, name))
    if baked:
        bake(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(_half(parameter, name))
    return {"layers": len(layers), "largest_change": largest}
