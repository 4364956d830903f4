"""From one quantization to one with fewer levels and a higher rank (Q4 -> Q2).

A layer that already has as few levels as asked keeps its indices, LUT and S; only the form of S
changes and its rank grows by ranks of magnitude zero. (Scales per group or per output become ranks;
ranks cannot become groups, one number of groups not another, and nothing but scales per output can
become those: such a target is refused.) Any other is quantized anew: its weight becomes what the
layer computes with now, and indices and scales are fitted to it, weighted by how much each input is
used. Or every layer is quantized anew from the teacher's weight: what training at more bits has
learned is dropped, and so is what their rounding lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import InputError, ParamsError
from lib.model.feedback import feed_back
from lib.model.linear import DirectionalScale, LowRankScale, LutLinear, Scale
from lib.model.surgery import is_mlp, quantized_layers, replace_layers
from lib.quant.codebook import fit_kmeans
from lib.quant.scales import to_directional, unit_columns, unit_rows
from lib.quant.spec import LinearSpec, ModelSpec, ScaleForm
from lib.quant.ste import lookup

REFERENCE_MAGNITUDE = 0.01  # what the reference implementation gives to added ranks


def _target(name: str, spec: ModelSpec) -> LinearSpec:
    target = spec.mlp if is_mlp(name) else spec.attention
    assert target is not None
    return target


def _unit_directions(rows: int, columns: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded random unit columns ``[rows, count]`` and unit rows ``[count, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, count, generator=generator)
    b = torch.randn(count, columns, generator=generator)
    return unit_columns(a), unit_rows(b)


def _grown_factors(
    layer: LutLinear, rank: int, magnitude: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(A_dir, B_dir, g) of the layer's S with ranks of ``magnitude`` added up to ``rank``."""
    with torch.no_grad():
        a, b = layer.factors()
        a_dir, b_dir, g = to_directional(a, b)
        extra = rank - g.numel()
        if extra > 0:
            more_a, more_b = _unit_directions(layer.out_features, layer.in_features, extra, seed)
            a_dir = torch.cat([a_dir, more_a.to(a_dir)], dim=1)
            b_dir = torch.cat([b_dir, more_b.to(b_dir)], dim=0)
            g = torch.cat([g, g.new_full((extra,), magnitude)])
    return a_dir, b_dir, g


def _grown_scale(form: ScaleForm, a_dir: Tensor, b_dir: Tensor, g: Tensor) -> Scale:
    if form is ScaleForm.DIRECTIONAL:
        return DirectionalScale(a_dir, b_dir, g)
    root = g.sqrt()
    # An added rank keeps its direction in B: zeros on both sides would never get a gradient.
    right = torch.where(g > 0, root, root.mean())
    return LowRankScale(a_dir * root, b_dir * right[:, None])


def keep_levels(layer: LutLinear, target: LinearSpec, seed: int) -> LutLinear:
    """The same W_q in another form of S and with a rank of at least the target's; scales per group
    or per output stay as they are where the target has them too."""
    if not target.scale.has_ranks:
        return layer
    rank = max(target.rank, layer.spec.rank_of(layer.in_features))
    spec = replace(layer.spec, rank=rank, scale=target.scale)
    scale = _grown_scale(target.scale, *_grown_factors(layer, rank, 0.0, seed))
    return LutLinear(spec, scale, layer.lut.detach(), layer.indices, _master(layer), _bias(layer))


def _master(layer: LutLinear) -> Tensor:
    assert layer.weight is not None
    return layer.weight.detach()


def _bias(layer: LutLinear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def quantize_anew(
    layer: LutLinear, weight: Tensor, target: LinearSpec, name: str, moments: Tensor | None
) -> LutLinear:
    """What takes a layer's place: ``weight [out, in]`` with the target's levels and rank."""
    return LutLinear.from_weight(weight, _bias(layer), target, name, moments)


def _check(model: nn.Module, spec: ModelSpec, *, may_keep: bool) -> dict[str, nn.Module]:
    layers = quantized_layers(model)
    if not layers:
        raise InputError("the checkpoint has no quantized layer to convert; train one first")
    for name, layer in layers.items():
        target = _target(name, spec)
        target.check_shape(layer.out_features, layer.in_features, name)
        if may_keep and target.lut_size >= layer.spec.lut_size:
            _check_kept(name, layer, target)
    return dict(layers.items())


def _check_kept(name: str, layer: LutLinear, target: LinearSpec) -> None:
    """Refuse a target that S cannot have without a change, where the layer keeps its levels."""
    spec, columns = layer.spec, layer.in_features
    if not target.scale.has_ranks:
        other_groups = min(target.group_size, columns) != min(spec.group_size, columns)
        if spec.scale is not target.scale:
            key, asked, has = "convert.scale", target.scale.value, spec.scale.value
        elif target.scale is ScaleForm.GROUP and other_groups:
            key, asked, has = "convert.group_size", str(target.group_size), str(spec.group_size)
        else:
            return
        levels = "convert.lut_size" if is_mlp(name) else "convert.attention_lut_size"
        raise ParamsError(
            f"{key} {asked} would change the scales of {name}, which keeps its {spec.lut_size} "
            f"levels; use {key} {has}, or a {levels} below {spec.lut_size}"
        )
    rank = spec.rank_of(columns)
    if target.rank < rank:
        key = "convert.rank" if is_mlp(name) else "convert.attention_rank"
        has = f"{rank} groups" if spec.scale is ScaleForm.GROUP else f"rank {rank}"
        raise ParamsError(
            f"{key} {target.rank} is below the {has} that {name} has; a conversion does not drop "
            f"ranks: use at least {rank}"
        )


def convert_model(
    model: PreTrainedModel,
    spec: ModelSpec,
    moments: Mapping[str, Tensor] | None,
    teacher: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Convert every quantized layer in place.

    Args:
        moments: E[x^2] of each layer's inputs, where the spec asks for refits, or E[x x^T], where
            it asks for error feedback.
        teacher: weights ``[out, in]`` that every layer is quantized anew from; None: layers with
            too many levels are, from what they compute with now.

    Returns:
        ``{"converted": layers quantized anew, "kept": layers with the same levels}``.

    Raises:
        InputError: nothing to convert. ParamsError: a rank does not fit or would shrink, or a form
            would change S where it has to stay.
    """
    layers = _check(model, spec, may_keep=teacher is None)
    anew: dict[str, LutLinear] = {}

    def make(name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module, LutLinear)
        target = _target(name, spec)
        if teacher is None and module.spec.lut_size <= target.lut_size:
            return keep_levels(module, target, spec.seed)
        weight = module.dequantized() if teacher is None else teacher[name]
        used = None if moments is None else moments[name]
        anew[name] = quantize_anew(module, weight, target, name, used)
        return anew[name]

    replace_layers(model, layers, make, "converting layers")
    feed_back(anew, moments)
    return {"converted": len(anew), "kept": len(layers) - len(anew)}


def convert_by_reference_rule(model: PreTrainedModel, spec: ModelSpec) -> None:
    """The reference implementation's conversion, in place, for comparison only.

    The new LUT is k-means on the old LUT's values alone; each index goes to the nearest new
    level; S is kept and random directions of magnitude 0.01 fill the added ranks.
    """

    def make(name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module, LutLinear)
        target = _target(name, spec)
        columns = module.in_features
        rank = max(target.rank_of(columns), module.spec.rank_of(columns))
        factors = _grown_factors(module, rank, REFERENCE_MAGNITUDE, spec.seed)
        old = module.levels().detach()
        lut, indices = old, module.indices
        if target.lut_size < module.spec.lut_size:
            lut = fit_kmeans(old, target.lut_size)
            nearest = (old[:, None] - lut[None, :]).abs().argmin(dim=1).to(torch.uint8)
            indices = lookup(nearest.float(), indices).to(torch.uint8)
        new = replace(module.spec, lut_size=lut.numel(), rank=rank, scale=ScaleForm.DIRECTIONAL)
        return LutLinear(
            new, DirectionalScale(*factors), lut, indices, _master(module), _bias(module)
        )

    replace_layers(model, _check(model, spec, may_keep=True), make, "reference rule for comparison")
