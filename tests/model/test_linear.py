"""The quantized layer against its equation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lib.base.errors import MismatchError, ParamsError
from lib.model.linear import (
    ChannelScale,
    DirectionalScale,
    GroupScale,
    LowRankScale,
    LutLinear,
    ParameterRole,
)
from lib.quant.codebook import distinct_fp16, project_learned
from lib.quant.refit import weighted_error
from lib.quant.spec import Codebook, LinearSpec, ScaleForm
from tests.tiny_models import linear_spec

OUT, IN = 24, 48
# 48 inputs in groups of 16; with a short last group; in one that is larger
KINDS: list[dict[str, Any]] = [
    *({"scale": form} for form in ScaleForm),
    *({"scale": ScaleForm.GROUP, "group_size": size} for size in (20, 100)),
]
FORMS = [(form, codebook) for form in ScaleForm for codebook in Codebook]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(bias: bool = False, seed: int = 0, **changes: Any) -> LutLinear:
    spec = linear_spec(**changes)
    return LutLinear.from_weight(
        randn(OUT, IN, seed=seed), randn(OUT) if bias else None, spec, "up_proj"
    )


def slow_weight(layer: LutLinear) -> Tensor:
    """LUT[idx] * S with whatever the spec asks for, in plain PyTorch."""
    scale, lut = layer.scale, layer.lut

    def rounded(x: Tensor) -> Tensor:  # straight through
        return x + (x.detach().half().float() - x.detach()) if layer.spec.ste_fp16 else x

    if isinstance(scale, LowRankScale):
        s = rounded(scale.a) @ rounded(scale.b)
    elif isinstance(scale, DirectionalScale):
        a = rounded(scale.a / scale.a.norm(dim=0)) * rounded(scale.g)
        s = a @ rounded(scale.b / scale.b.norm(dim=1, keepdim=True))
    elif isinstance(scale, ChannelScale):
        s = rounded(scale.f * scale.s).repeat(1, IN)
    else:
        s = rounded(scale.s).repeat_interleave(layer.spec.group_size, dim=1)[:, :IN]
    weight = rounded(lut)[layer.indices.long()] * s
    if layer.weight is not None and layer.weight.requires_grad:
        weight = weight + (layer.weight - layer.weight.detach())
    return weight


@pytest.mark.parametrize("ste_fp16", [True, False])
@pytest.mark.parametrize(("form", "codebook"), FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_equation(
    form: ScaleForm, codebook: Codebook, ste_fp16: bool, bias: bool
) -> None:
    layer = make(scale=form, codebook=codebook, ste_fp16=ste_fp16, bias=bias)
    x = randn(2, 5, IN, seed=1)
    slow = F.linear(x, slow_weight(layer), layer.bias)
    assert torch.allclose(layer(x), slow, atol=1e-5)
    weight = randn(OUT, IN)
    assert weighted_error(weight, layer.dequantized(), torch.ones(IN)) < 0.02  # 4 bits


def test_materialized_forward_is_the_rank_by_rank_forward() -> None:
    layer = make(scale=ScaleForm.DIRECTIONAL, lut_size=4)
    assert isinstance(layer.scale, DirectionalScale)
    x, levels = randn(7, IN, seed=1), layer.levels()[layer.indices.long()]
    a, b, g = layer.scale.directions(True)
    slow = sum((g[k] * a[:, k]) * ((x * b[k]) @ levels.T) for k in range(layer.spec.rank))
    assert torch.allclose(layer(x), slow, atol=1e-4)


@pytest.mark.parametrize("ste_fp16", [True, False])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_of_every_parameter(kind: dict[str, Any], together: bool, ste_fp16: bool) -> None:
    """Scales, LUT and weight against autograd; also when all of them train together."""
    layer = make(**kind, codebook=Codebook.LEARNED, ste_fp16=ste_fp16)
    names = [n for n in layer.roles() if together or n != "weight"]
    for name in names:
        layer.get_parameter(name).requires_grad_(True)
    parameters = [layer.get_parameter(name) for name in names]
    x, upstream = randn(6, IN, seed=1), randn(6, OUT, seed=2)
    fast = torch.autograd.grad((layer(x) * upstream).sum(), parameters)
    slow = torch.autograd.grad((F.linear(x, slow_weight(layer)) * upstream).sum(), parameters)
    for name, one, other in zip(names, fast, slow, strict=True):
        assert one.abs().max() > 0, name
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max())), name


@pytest.mark.parametrize("size", [16, 20, 100])
def test_group_scales_are_exact(size: int) -> None:
    layer = make(scale=ScaleForm.GROUP, group_size=size)
    assert isinstance(layer.scale, GroupScale)
    assert layer.scale.s.shape == (OUT, -(-IN // size))
    assert torch.equal(layer.dequantized(), slow_weight(layer))
    rival = make(scale=ScaleForm.GROUP, group_size=15)
    assert not torch.equal(layer.dequantized(), rival.dequantized())


def test_bf16_autocast_does_not_touch_the_fp16_rounding() -> None:
    layer = make(scale=ScaleForm.DIRECTIONAL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.dequantized()
        y = layer(randn(3, IN))
    assert y.dtype == torch.bfloat16
    assert torch.equal(inside, layer.dequantized())
    assert layer.weight is not None and layer.weight.dtype == torch.float32


def test_searched_and_stored_indices_compute_the_same_bit_for_bit() -> None:
    for form, codebook in FORMS:
        layer = make(scale=form, codebook=codebook, lut_size=8)
        x = randn(3, IN)
        stored, product = layer.dequantized(), layer(x)
        assert layer.weight is not None
        layer.weight.requires_grad_(True)
        assert torch.equal(layer.dequantized(), stored)
        assert torch.equal(layer(x), product)


def test_refresh_indices_follows_the_master() -> None:
    layer = make()
    assert layer.weight is not None
    before = layer.indices.clone()
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer.indices, before)
    layer.refresh_indices()
    a, b = layer.factors()
    ratio = layer.weight / (a @ b)
    nearest = (ratio[..., None] - layer.levels()).abs().argmin(dim=-1)
    assert (layer.indices != nearest).float().mean() < 0.01  # ties within FP16's rounding
    assert not torch.equal(layer.indices, before)


def moved_scales(layer: LutLinear, seed: int) -> None:
    """As if the scales had trained: other values, some negative S, a row and a rank of zeros."""
    with torch.no_grad():
        for parameter in layer.scale.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.mul_(1 + 0.7 * noise)
        if isinstance(layer.scale, GroupScale):
            layer.scale.s[3] = 0.0
            layer.scale.s[:, -1] = 0.0
        elif isinstance(layer.scale, ChannelScale):
            layer.scale.s[3] = 0.0
            layer.scale.s[4] = -layer.scale.s[5].abs()
        else:
            layer.scale.a[3] = 0.0
            layer.scale.b[-1] = 0.0


@given(
    st.sampled_from(FORMS),
    st.sampled_from([2, 4, 8, 16, 64, 256]),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_rebase_keeps_every_index_and_moves_little(
    kind: tuple[ScaleForm, Codebook], size: int, ste_fp16: bool, seed: int
) -> None:
    form, codebook = kind
    layer = make(
        scale=form,
        codebook=codebook,
        lut_size=size,
        ste_fp16=ste_fp16,
        seed=seed,
        group_size=4,  # so many that some turn negative
    )
    moved_scales(layer, seed)
    assert layer.weight is not None
    before, indices = layer.weight.clone(), layer.indices.clone()
    product = layer.dequantized()
    a, b = layer.factors()
    scale = a @ b
    assert (scale < 0).any() and (scale == 0).any()
    wrong = (layer.nearest_indices() != indices) & (scale != 0)

    layer.rebase_weight()
    assert torch.equal(layer.indices, indices)
    kept = layer.nearest_indices() == indices
    assert kept[scale != 0].all()
    layer.weight.requires_grad_(True)
    assert torch.equal(layer.dequantized(), product)  # searched anew: the same, bit for bit
    # Only those in a wrong cell moved, and no farther than just across their cell's edge.
    step = layer.weight.detach() - before
    assert (step[~wrong] == 0).all()
    lut = layer.levels()
    edges = (lut[1:] + lut[:-1]) / 2
    low = torch.cat([lut.new_tensor([-torch.inf]), edges])[indices.long()]
    high = torch.cat([edges, lut.new_tensor([torch.inf])])[indices.long()]
    ratio = (before / scale)[wrong]
    least = torch.maximum(low[wrong] - ratio, ratio - high[wrong]).clamp_min(0) * scale[wrong].abs()
    width = float(lut.diff().max()) * scale[wrong].abs()
    slack = 0.01 * width + (2**-11 * scale.abs().max() if codebook.is_affine else 0)
    assert (step[wrong].abs() <= least * (1 + 1e-4) + slack).all()


@pytest.mark.parametrize("codebook", [Codebook.LEARNED, Codebook.KMEANS])
def test_rebase_into_narrow_cells(codebook: Codebook) -> None:
    layer = make(codebook=codebook, lut_size=8)
    close = torch.tensor([-1.0, -0.3, -0.2999, 0.25, 0.25, 0.25, 0.8, 0.8])
    project = project_learned if codebook is Codebook.LEARNED else distinct_fp16
    with torch.no_grad():  # neighbours as close as training or k-means may leave them
        layer.lut.copy_(project(close))
    moved_scales(layer, 1)
    indices = layer.indices.clone()
    layer.rebase_weight()
    a, b = layer.factors()
    assert torch.equal(layer.nearest_indices()[a @ b != 0], indices[a @ b != 0])


def test_rebase_of_an_untouched_layer_moves_nothing() -> None:
    for form, codebook in FORMS:
        layer = make(scale=form, codebook=codebook)
        assert layer.weight is not None
        before = layer.weight.clone()
        layer.rebase_weight()
        assert torch.equal(layer.weight, before)


def test_a_layer_of_zeros_works() -> None:
    layer = LutLinear.from_weight(torch.zeros(OUT, IN), None, linear_spec(), "up_proj")
    assert layer.dequantized().abs().max() < 1e-7
    layer.rebase_weight()


def test_a_snapped_layer_cannot_be_quantized_again() -> None:
    layer = make()
    snapped = LutLinear(layer.spec, layer.scale, layer.lut.detach(), layer.indices, None, None)
    assert ParameterRole.WEIGHT not in snapped.roles().values()
    assert torch.equal(snapped.dequantized(), layer.dequantized())
    for action in (snapped.rebase_weight, snapped.refresh_indices):
        with pytest.raises(MismatchError, match="snapped"):
            action()


def test_roles() -> None:
    assert make(bias=True).roles() == {
        "scale.a": ParameterRole.SCALE_DIRECTION,
        "scale.b": ParameterRole.SCALE_DIRECTION,
        "scale.g": ParameterRole.SCALE_MAGNITUDE,
        "lut": ParameterRole.LUT,
        "weight": ParameterRole.WEIGHT,
        "bias": ParameterRole.FROZEN,
    }
    for form in (ScaleForm.LOWRANK, ScaleForm.GROUP):
        layer = make(scale=form)
        assert ParameterRole.SCALE_DIRECTION in layer.roles().values()
        assert ParameterRole.SCALE_MAGNITUDE not in layer.roles().values()
        assert set(layer.roles()) == {name for name, _ in layer.named_parameters()}
        assert set(layer.state_dict()) == {*layer.roles(), "indices"}  # the constant E is not kept


@pytest.mark.parametrize("form", [f for f in ScaleForm if f is not ScaleForm.CHANNEL])
def test_every_form_starts_from_the_same_scale(form: ScaleForm) -> None:
    """With a rank for each of the three groups the SVD leaves nothing out."""
    layer, group = (make(scale=f, ste_fp16=False, rank=3) for f in (form, ScaleForm.GROUP))
    a, b = layer.factors()
    assert torch.allclose(a @ b, torch.matmul(*group.factors()), rtol=1e-5)
    assert weighted_error(group.dequantized(), layer.dequantized(), torch.ones(IN)) < 1e-4


def test_a_rank_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ParamsError, match="rank 25 .*up_proj .*at most 24"):
        make(rank=25)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_refits_need_and_use_importance(kind: dict[str, Any]) -> None:
    spec: LinearSpec = linear_spec(lut_size=4, refit_steps=3, **kind)
    weight, used = randn(OUT, IN), randn(IN, seed=3).pow(4)
    with pytest.raises(ValueError, match="moments"):
        LutLinear.from_weight(weight, None, spec, "up_proj")
    refitted = LutLinear.from_weight(weight, None, spec, "up_proj", used)
    plain = make(lut_size=4, **kind)
    assert weighted_error(weight, refitted.dequantized(), used) < 0.8 * weighted_error(
        weight, plain.dequantized(), used
    )


@given(st.sampled_from(FORMS), st.sampled_from([2, 4, 16]), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_rebase_with_a_margin_leaves_the_edges(
    kind: tuple[ScaleForm, Codebook], size: int, seed: int
) -> None:
    form, codebook = kind
    layer = make(scale=form, codebook=codebook, lut_size=size, seed=seed)
    moved_scales(layer, seed)
    indices, product = layer.indices.clone(), layer.dequantized()
    layer.rebase_weight(0.1)
    assert torch.equal(layer.indices, indices)
    assert torch.equal(layer.dequantized(), product)
    a, b = layer.factors()
    scale, lut = a @ b, layer.levels()
    used = scale != 0
    assert (layer.nearest_indices() == indices)[used].all()
    assert layer.weight is not None
    ratio, level = (layer.weight / scale)[used], lut[indices.long()][used]
    edges = (lut[1:] + lut[:-1]) / 2
    gap = (ratio[:, None] - edges).abs().amin(dim=1)
    nearest = (ratio[:, None] - edges).abs().argmin(dim=1)
    floor = 0.1 * (level - edges[nearest]).abs()
    assert (gap >= 0.95 * floor).all()  # edges and levels differ by the rounding of the levels


def test_a_searched_range_replaces_the_given_one() -> None:
    spec = linear_spec(lut_size=4, range=0.2, search_range=True)
    x = randn(200, IN, seed=3)
    weight, moments = randn(OUT, IN), x.T @ x / len(x)
    with pytest.raises(ValueError, match="needs the second moments"):
        LutLinear.from_weight(weight, None, spec, "up_proj", moments.diagonal())
    found = LutLinear.from_weight(weight, None, spec, "up_proj", moments)
    assert found.spec.range > 0.2
    given = dataclasses.replace(found.spec, search_range=False)
    same = LutLinear.from_weight(weight, None, given, "up_proj")
    assert torch.equal(found.dequantized(), same.dequantized())
