"""An adapter merged into the indices: W = W_q + (alpha / r) B A, quantized again.

At few bits most changes are smaller than half the distance between two levels, and move no index:
what arrives is measured, and a merge that loses most of it is refused.

Shapes: W, W_q, indices ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import GateError, InputError
from lib.base.progress import track
from lib.model.adapter import change_of, remove_adapters
from lib.model.linear import LutLinear, make_scale
from lib.model.surgery import replace_module
from lib.quant.refit import refit
from lib.snap.snap import snap_layer

LEAST_SHARE = 0.5
"""Share of the wanted change that has to arrive."""
REFITS = 5
"""Alternating refits of indices and scales per layer, where they are asked for."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What became of the wanted change D = W - W_q, with R = W_merged - W_q, of a layer or of all.

    Attributes:
        weights: number of indices; moved: how many are others now.
        wanted: |D|^2; along: R . D; missed: |W_merged - W|^2.
    """

    weights: int
    moved: int
    wanted: float
    along: float
    missed: float

    @property
    def share(self) -> float:
        """Share of the change that arrived: the projection of R on D, R . D / D . D."""
        return self.along / self.wanted if self.wanted else 0.0

    @property
    def error(self) -> float:
        """Squared distance from the wanted weight, relative to that of doing nothing."""
        return self.missed / self.wanted if self.wanted else 0.0


def _requantized(layer: LutLinear, weight: Tensor) -> LutLinear:
    """The layer with the indices that are nearest to a weight; scales and LUT stay."""
    bias = None if layer.bias is None else layer.bias.detach()
    lut, indices = layer.lut.detach(), layer.indices.clone()
    free = LutLinear(layer.spec, layer.scale, lut, indices, weight, bias)
    free.refresh_indices()
    return LutLinear(layer.spec, layer.scale, lut, free.indices, None, bias)


def _refitted(layer: LutLinear, weight: Tensor, name: str) -> LutLinear:
    """The layer with indices and scales fitted to a weight, every input alike, and snapped."""
    bias = None if layer.bias is None else layer.bias.detach()
    spec = replace(layer.spec, refit_steps=REFITS)
    even = torch.ones_like(weight[0])
    a, b = refit(weight, *layer.factors(), layer.levels(), even, spec)
    scale = make_scale(layer.spec.scale, a, b)
    free = LutLinear(layer.spec, scale, layer.lut.detach(), layer.indices.clone(), weight, bias)
    free.refresh_indices()
    return snap_layer(free, name)


@torch.no_grad()
def merge_layer(
    layer: LutLinear, change: Tensor, name: str, *, refit_scales: bool
) -> tuple[LutLinear, Moved]:
    """A snapped layer for ``W_q + change``, and how much of the change it has.

    Raises:
        GateError: a refitted scale exceeds FP16.
    """
    before = layer.dequantized()
    weight = before + change
    merged = _refitted(layer, weight, name) if refit_scales else _requantized(layer, weight)
    after = merged.dequantized()
    change = (weight - before).double()  # as float32 holds it
    moved = Moved(
        weights=layer.indices.numel(),
        moved=int((merged.indices != layer.indices).sum()),
        wanted=float(change.square().sum()),
        along=float(((after - before).double() * change).sum()),
        missed=float((after - weight).double().square().sum()),
    )
    return merged, moved


def merge_adapters(model: PreTrainedModel, *, refit_scales: bool) -> dict[str, Moved]:
    """Merge the model's adapters into its layers, in place; returns what arrived, by layer.

    Raises:
        InputError: an adapter stands beside a layer that is not quantized, or still has its master.
        GateError: see :func:`merge_layer`.
    """
    found: dict[str, Moved] = {}
    adapters = remove_adapters(model)
    pairs: Iterable[tuple[str, LoraLayer]] = adapters.items()
    if refit_scales:  # the rest takes a moment
        pairs = track(pairs, len(adapters), "merging layers")
    for name, adapter in pairs:
        layer = model.get_submodule(name)
        if not isinstance(layer, LutLinear) or layer.weight is not None:
            raise InputError(
                f"{name} is not snapped; merge into the snapped model that the adapter was trained "
                "on (runs/snap/model)"
            )
        merged, found[name] = merge_layer(
            layer, change_of(adapter), name, refit_scales=refit_scales
        )
        replace_module(model, name, merged)
    return found


def overall(rows: dict[str, Moved]) -> Moved:
    """The sums over all layers."""
    keys = ("weights", "moved", "wanted", "along", "missed")
    sums = {key: sum(getattr(row, key) for row in rows.values()) for key in keys}
    return Moved(**sums)


def check_arrived(total: Moved, *, refit_scales: bool) -> None:
    """Refuse a merge that is not worth it.

    Raises:
        GateError: less than half of the wanted change arrives; with refitted scales, the merged
            weights are no nearer to the wanted ones than the model without the adapter.
    """
    if not total.wanted:
        raise GateError("the adapter changes nothing: there is nothing to merge")
    if refit_scales:
        if total.error >= 1:
            raise GateError(
                f"with refitted scales the merged weights are {total.error:.2f} times as far "
                "(squared) from the wanted ones as without the adapter; keep the adapter separate"
            )
    elif total.share < LEAST_SHARE:
        raise GateError(
            f"{total.share:.1%} of the adapter's change arrives in the indices ({total.moved:,} of "
            f"{total.weights:,} move), at least {LEAST_SHARE:.0%} has to; keep the adapter "
            "separate, or use --refit-scales"
        )
