"""A scale per output and one learned clip factor per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.model.linear import ChannelScale, LutLinear, ParameterRole
from lib.quant.spec import Codebook, ScaleForm
from lib.snap.snap import snap_layer
from tests.tiny_models import linear_spec

OUT, IN = 12, 40
SIZES = st.sampled_from([4, 16])  # 2 and 4 bits
RATIOS = st.integers(-20, 20).map(float) | st.integers(-1280, 1280).map(lambda n: n / 64)
SEEDS = st.integers(0, 2**20)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(size: int, seed: int = 0, **changes: Any) -> tuple[LutLinear, ChannelScale, Tensor]:
    """A layer with balanced levels, its scale, its weight."""
    spec = linear_spec(
        scale=ScaleForm.CHANNEL, codebook=Codebook.BALANCED, lut_size=size, **changes
    )
    weight = randn(OUT, IN, seed=seed)
    used = randn(IN, seed=seed + 1).pow(4)
    layer = LutLinear.from_weight(weight, None, spec, "up_proj", used)
    assert isinstance(layer.scale, ChannelScale)
    return layer, layer.scale, weight


def slow_level(ratio: float, size: int) -> float:
    """The nearest of so many half integers; ties go down, and the ends hold what is beyond."""
    levels = [index - (size - 1) / 2 for index in range(size)]
    return min(levels, key=lambda level: (abs(ratio - level), level))


@given(SIZES, st.lists(RATIOS, min_size=1, max_size=IN))
def test_rounding_is_the_nearest_level_with_ties_and_saturation(
    size: int, ratios: list[float]
) -> None:
    """S = 1, so that weights are ratios; many are whole numbers, where the ties are."""
    weight = torch.tensor([ratios])
    spec = linear_spec(scale=ScaleForm.CHANNEL, codebook=Codebook.BALANCED, lut_size=size)
    layer = LutLinear.from_weight(weight, None, spec, "up_proj")
    with torch.no_grad():
        for parameter in layer.scale.parameters():
            parameter.fill_(1.0)
    layer.refresh_indices()
    slow = [slow_level(float(ratio), size) for ratio in weight[0]]
    assert layer.dequantized().tolist() == [slow]


def test_the_reference_knows_ties_and_ends() -> None:
    assert [slow_level(x, 4) for x in (-9.0, -1.0, 0.0, 1.0, 1.01, 9.0)] == [
        *(-1.5, -1.5, -0.5, 0.5, 1.5, 1.5)
    ]


@given(SIZES, st.floats(0.3, 1.0), SEEDS)
@settings(max_examples=20, deadline=None)
def test_s_is_the_rows_maximum_and_the_clip_its_share(size: int, clip: float, seed: int) -> None:
    layer, scale, weights = make(size, seed, range=clip)
    assert scale.s.shape == (OUT, 1) and scale.f.tolist() == [pytest.approx(clip)]
    for row, weight in zip(layer.dequantized(), weights, strict=True):
        top = float(weight.abs().max()) * clip  # what the outermost level stands for
        assert float(row.abs().max()) == pytest.approx(top, rel=2**-10)
        clipped = weight.abs() >= top
        assert (row[clipped].abs() == row.abs().max()).all()
        half_step = top / (size - 1)
        lost = (row - weight).abs()[~clipped]
        assert (lost <= half_step + 2**-10 * top).all()  # S was rounded to FP16


@given(SIZES, SEEDS)
@settings(max_examples=20, deadline=None)
def test_clip_gradients_are_finite_differences(size: int, seed: int) -> None:
    """In float64 and with the indices held, where the loss is quadratic in f and in s."""
    layer, scale, _ = make(size, seed, ste_fp16=False, range=0.8)
    layer.double()
    x, target = randn(5, IN, seed=seed).double(), randn(5, OUT).double()

    def loss() -> Tensor:
        return (layer(x) - target).square().sum()

    scale.requires_grad_(True)
    loss().backward()
    for parameter in (scale.f, scale.s):
        assert parameter.grad is not None
        values, gradients = parameter.detach().view(-1), parameter.grad.view(-1)
        for place, gradient in enumerate(gradients.tolist()):
            value, change, sides = float(values[place]), 1e-3, []
            for sign in (1, -1):
                values[place] = value + sign * change
                sides.append(float(loss().detach()))
            values[place] = value
            slope = (sides[0] - sides[1]) / (2 * change)
            assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("ste_fp16", [True, False])
def test_gradients_are_the_equations(size: int, ste_fp16: bool) -> None:
    """dL/df = sum G Q s, dL/ds = f sum_j G Q, dL/dW = G, all together."""
    layer, scale, _ = make(size, ste_fp16=ste_fp16)
    assert layer.weight is not None
    layer.requires_grad_(True)
    x, grad = randn(7, IN), randn(7, OUT, seed=2)
    (layer(x) * grad).sum().backward()
    outer = grad.T @ x
    levels = layer.levels().detach()[layer.indices.long()]
    s, f = scale.s.tolist(), scale.f.tolist()[0]
    slow_f = sum(float(outer[i, j] * levels[i, j]) * s[i][0] for i in range(OUT) for j in range(IN))
    slow_s = [f * float((outer[i] * levels[i]).sum()) for i in range(OUT)]
    assert scale.f.grad is not None and scale.s.grad is not None
    assert scale.f.grad.tolist() == [pytest.approx(slow_f, rel=1e-4)]
    assert scale.s.grad[:, 0].tolist() == pytest.approx(slow_s, rel=1e-4, abs=1e-4)
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, outer, rtol=1e-5, atol=1e-5)


def test_the_device_holds_the_rounded_product() -> None:
    layer, scale, _ = make(4, range=0.77)
    product, ones = layer.factors()
    assert torch.equal(product, (scale.f * scale.s).half().float())
    assert not torch.equal(product, scale.f.half().float() * scale.s.half().float())
    assert torch.equal(ones, torch.ones(1, IN))


def test_snap_keeps_the_product_and_a_clip_of_one() -> None:
    layer, _, _ = make(4, refit_steps=3)
    weight = layer.dequantized()
    once = snap_layer(layer, "up_proj")
    twice = snap_layer(once, "up_proj")
    for snapped in (once, twice):
        assert isinstance(snapped.scale, ChannelScale) and snapped.scale.f.tolist() == [1.0]
        assert torch.equal(snapped.scale.s, layer.factors()[0])
        assert torch.equal(snapped.dequantized(), weight)


def test_roles_and_what_is_stored() -> None:
    layer, _, _ = make(4)
    roles = layer.roles()
    assert roles["scale.s"] is ParameterRole.SCALE_DIRECTION
    assert roles["scale.f"] is ParameterRole.SCALE_MAGNITUDE
    assert set(layer.state_dict()) == {*roles, "indices"}  # the ones are not kept


def test_without_a_refit_it_starts_as_one_group() -> None:
    spec = linear_spec(scale=ScaleForm.GROUP, group_size=IN, range=0.7, lut_size=4)
    group = LutLinear.from_weight(randn(OUT, IN), None, spec, "up_proj")
    channel = linear_spec(scale=ScaleForm.CHANNEL, range=0.7, lut_size=4)
    layer = LutLinear.from_weight(randn(OUT, IN), None, channel, "up_proj")
    assert torch.equal(layer.dequantized(), group.dequantized())
