"""One imported layer against the reference's forward pass, written out slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.base.errors import InputError, LutqatError, MismatchError
from lib.model.foreign_layer import ForeignLayer, clamp_factors, import_layer
from lib.model.linear import DirectionalScale, LowRankScale, LutLinear
from lib.quant.spec import Codebook
from tests.model.reference_checkpoints import (
    Tensors,
    uniform,
    v1_layer,
    v1_weight,
    v2_factors,
    v2_indices,
    v2_layer,
    v2_weight,
)

EPS = torch.finfo(torch.float32).eps


def make(kind: Any, size: int = 16, lut: Tensor | None = None) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 40, generator=generator) * 0.2
    return kind(weight, generator, uniform(size) if lut is None else lut)


def read(tensors: Tensors, **config: Any) -> LutLinear:
    return import_layer(ForeignLayer("some.layer", tensors), config)


def assert_same(layer: LutLinear, expected: Tensor) -> None:
    """Equal within a few roundings of the sum over ranks."""
    a, b = layer.factors()
    assert ((layer.dequantized() - expected).abs() <= 16 * EPS * (a.abs() @ b.abs())).all()


@pytest.mark.parametrize("size", [2, 4, 16, 256])
def test_v1_equals_its_forward_pass(size: int) -> None:
    tensors = make(v1_layer, size)
    layer = read(tensors)
    assert isinstance(layer.scale, LowRankScale)
    assert layer.spec.rank == 4  # 3, and one for the row that the clamp at 1e-8 touches
    assert layer.spec.codebook is Codebook.UNIFORM
    assert_same(layer, v1_weight(tensors))
    unclamped = tensors["scale_A"] @ tensors["scale_B"][:, :40]
    assert unclamped.min() < 0  # without the clamp the test would not see it


def test_v1_learned_lut_keeps_the_reference_rule() -> None:
    """Indices come from the even grid, not from the nearest level."""
    tensors = make(v1_layer, lut=torch.tensor([-1.0, -0.9, 0.2, 1.0]))
    layer = read(tensors)
    assert layer.spec.codebook is Codebook.KMEANS
    assert_same(layer, v1_weight(tensors))
    assert not torch.equal(layer.nearest_indices(), layer.indices)


def test_v1_lut_with_a_zero() -> None:
    tensors = make(v1_layer, lut=torch.tensor([-1.0, -0.5, 0.0, 1.0]))
    assert_same(read(tensors), v1_weight(tensors))


@pytest.mark.parametrize("config", [{}, {"snapped_mode": "lut"}, {"snapped": True}])
def test_v1_snapped_to_lut_values(config: dict[str, Any]) -> None:
    tensors = make(v1_layer, 4)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(4, (48, 40), generator=generator)
    tensors["weight"] = tensors["lut"][indices]
    layer = read(tensors, **config)
    assert_same(layer, v1_weight(tensors, "lut"))
    assert torch.equal(layer.indices.long(), indices)
    assert layer.weight is not None
    assert_same(layer, layer.weight)  # so that training goes on from there


@pytest.mark.parametrize("config", [{}, {"snapped_mode": "baked"}])
def test_v1_snapped_with_baked_scales(config: dict[str, Any]) -> None:
    tensors = make(v1_layer, 16)
    tensors["weight"] = v1_weight(tensors)
    assert_same(read(tensors, **config), v1_weight(tensors, "baked"))


def test_bfloat16_tensors_are_used_as_they_are() -> None:
    tensors = {name: value.bfloat16() for name, value in make(v1_layer, 16).items()}
    assert_same(read(tensors), v1_weight(tensors))


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"force_positive_scales": False, "magnitude_activation": "identity"},
        {"force_positive_scales": True, "magnitude_activation": "softplus"},
    ],
)
def test_v2_equals_its_forward_pass(size: int, config: dict[str, Any]) -> None:
    tensors = make(v2_layer, size)
    layer = read(tensors, **config)
    assert isinstance(layer.scale, DirectionalScale)
    assert_same(layer, v2_weight(tensors, config))


def test_v2_adds_a_little_to_every_magnitude() -> None:
    tensors = make(v2_layer, 4)
    tensors["_indices"] = v2_indices(tensors, {})
    tensors["rank_magnitude"] *= 1e-4
    assert_same(read(tensors), v2_weight(tensors))
    with pytest.raises(AssertionError):  # without the 1e-6
        assert_same(read(tensors, magnitude_eps=0.0), v2_weight(tensors))


def test_v2_frozen_indices_win_over_the_weight() -> None:
    tensors = make(v2_layer, 4)
    tensors["_indices"] = v2_indices(tensors, {})
    tensors["weight"] = -tensors["weight"]
    assert_same(read(tensors), v2_weight(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_v2_frozen_levels(dtype: torch.dtype) -> None:
    lut = torch.tensor([-1.0, -0.3213, 0.3213, 1.0])
    tensors = make(v2_layer, lut=lut)
    tensors["_Q"] = lut[v2_indices(tensors, {})].to(dtype)
    layer = read(tensors)
    assert_same(layer, v2_weight(tensors))
    assert torch.equal(layer.levels()[layer.indices.long()], tensors["_Q"].float())


@pytest.mark.parametrize("flag", [True, False])
def test_v2_baked_scales(flag: bool) -> None:
    """Magnitude in A, unit g: with the flag, or in older files without it."""
    tensors = make(v2_layer, 4)
    a, b, g = v2_factors(tensors, {})
    tensors["_indices"] = v2_indices(tensors, {})
    tensors |= {"scale_A": a * g, "scale_B": b, "rank_magnitude": torch.ones_like(g)}
    tensors["_scales_baked_flag"] = torch.tensor(1, dtype=torch.int8)
    expected = v2_weight(tensors)
    if not flag:
        del tensors["_scales_baked_flag"]
    assert_same(read(tensors), expected)


def test_lut_in_any_order_is_sorted() -> None:
    tensors = make(v2_layer, lut=torch.tensor([0.5, -1.0, 1.0, -0.25]))
    layer = read(tensors)
    assert layer.lut.tolist() == [-1.0, -0.25, 0.5, 1.0]
    assert_same(layer, v2_weight(tensors))


def test_bias_and_harmless_tensors() -> None:
    tensors = make(v2_layer, 4)
    tensors |= {"bias": torch.arange(48.0), "lora_B": torch.zeros(48, 2), "lora_A": torch.ones(2)}
    layer = read(tensors)
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.arange(48.0))


@pytest.mark.parametrize("columns_first", [False, True])
def test_clamped_factors(columns_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(20, 2, generator=generator)
    b = torch.rand(2, 30, generator=generator)
    a[3:5, 1] = -2.0
    if columns_first:
        a, b = b.T.contiguous(), a.T.contiguous()
    new_a, new_b = clamp_factors(a, b, "x")
    expected = (a @ b).clamp_min(1e-8)
    assert new_a.shape[1] == 4
    assert torch.allclose(new_a @ new_b, expected, rtol=0, atol=16 * EPS * 4)
    with pytest.raises(InputError, match="no low-rank matrix"):
        clamp_factors(-a.abs(), b.abs(), "x")


def spoiled(kind: Any, **changes: Tensor | None) -> Tensors:
    tensors: dict[str, Any] = {**make(kind, 4), **changes}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "error", "text"),
    [
        (spoiled(v1_layer, lut=uniform(5)), {}, InputError, "5 entries"),
        (spoiled(v1_layer, lut=None), {}, InputError, "0 entries"),
        (spoiled(v1_layer, scale_B=torch.ones(3, 7)), {}, InputError, "40 inputs"),
        (spoiled(v2_layer, scale_B=torch.ones(4, 7)), {}, InputError, r"\[4, 7\].*\[4, 40\]"),
        (spoiled(v2_layer, rank_magnitude=torch.ones(9)), {}, InputError, "rank_magnitude"),
        (spoiled(v1_layer, scale_A=torch.full((48, 3), torch.nan)), {}, InputError, "NaN"),
        (spoiled(v2_layer, lora_B=torch.ones(48, 2)), {}, InputError, "recovery adapter"),
        (spoiled(v2_layer, A_lut=torch.ones(64)), {}, InputError, "A_lut"),
        (spoiled(v1_layer, strange=torch.ones(1)), {}, InputError, "strange"),
        (spoiled(v2_layer, _indices=torch.full((48, 40), 4)), {}, InputError, "beyond its LUT"),
        (spoiled(v2_layer, _Q=torch.full((48, 40), 0.1)), {}, MismatchError, "not in its lut"),
        (spoiled(v1_layer), {"snapped_mode": "lut"}, MismatchError, "values of its LUT"),
        (spoiled(v1_layer), {"snapped_mode": "baked"}, MismatchError, "LUT values times"),
        (spoiled(v2_layer), {"magnitude_activation": "x"}, InputError, "'x'"),
    ],
)
def test_what_cannot_be_read(
    tensors: Tensors, config: dict[str, Any], error: type[LutqatError], text: str
) -> None:
    with pytest.raises(error, match=text):
        read(tensors, **config)
