"""The rank-by-rank form against the dequantized product, and against the equation by loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.ane.factored import FactoredLinear, factorize, restore
from lib.model.linear import LutLinear
from lib.model.surgery import quantize_model, quantized_layers
from lib.quant.fp16 import is_fp16_exact
from lib.quant.spec import ModelSpec, ScaleForm
from tests.ane.tiny import linear_spec, snapped_model, token_sequences


def _layer(form: ScaleForm, rank: int, *, bias: bool) -> LutLinear:
    torch.manual_seed(rank)
    model = nn.ModuleDict({"up_proj": nn.Linear(48, 40, bias=bias)})
    quantize_model(
        model, ModelSpec(mlp=linear_spec(scale=form, rank=rank, lut_size=4), attention=None)
    )
    return quantized_layers(model)["up_proj"]


def _by_the_equation(layer: LutLinear, x: Tensor) -> Tensor:
    a, b = layer.factors()
    levels = layer.levels()[layer.indices.long()]
    y = torch.zeros(x.shape[0], a.shape[0], dtype=torch.float64)
    for k in range(a.shape[1]):
        y += a[:, k].double() * (b[k].double() * x.double() @ levels.double().T)
    return y


@pytest.mark.parametrize("form", ScaleForm)
@pytest.mark.parametrize(("rank", "bias"), [(1, True), (3, False), (12, True)])
def test_equals_dequantized_product(form: ScaleForm, rank: int, bias: bool) -> None:
    layer = _layer(form, rank, bias=bias)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = FactoredLinear(layer, fp16=False)(x)
        dense = layer(x)
        slow = _by_the_equation(layer, x)
        slow = slow if layer.bias is None else slow + layer.bias.double()
        # what the dense float32 product itself loses against float64, times a few for r sums
        weight = layer.dequantized().double()
        naive = (F.linear(x, layer.dequantized()).double() - x.double() @ weight.T).abs().max()
    assert (y.double() - slow).abs().max() <= 8 * naive.clamp_min(1e-7)
    assert (y - dense).abs().max() <= 8 * naive.clamp_min(1e-7)


def test_batched_input_keeps_its_shape() -> None:
    layer = _layer(ScaleForm.DIRECTIONAL, 4, bias=True)
    factored = FactoredLinear(layer, fp16=False)
    x = torch.randn(2, 3, 48)
    assert factored(x).shape == (2, 3, 40)
    assert torch.allclose(factored(x)[1, 2], factored(x[1, 2]), atol=1e-5)


def test_fp16_holds_every_constant_exactly() -> None:
    layer = _layer(ScaleForm.DIRECTIONAL, 4, bias=True)
    held = FactoredLinear(layer, fp16=True)
    assert held.bias is not None
    assert all(is_fp16_exact(part) for part in (held.a, held.b, held.lut, held.bias))
    assert not is_fp16_exact(FactoredLinear(layer, fp16=False).a)


def test_factorize_and_restore_a_model() -> None:
    model = snapped_model()
    ids = token_sequences()[0][None]
    with torch.no_grad():
        before = model(ids).logits
        originals = factorize(model, fp16=False)
        assert len(originals) == 14
        assert not quantized_layers(model)
        factored = model(ids).logits
        restore(model, originals)
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(factored, before)
    assert torch.allclose(factored, before, atol=1e-4)


def test_a_swapped_factor_is_noticed() -> None:
    layer = _layer(ScaleForm.DIRECTIONAL, 3, bias=False)
    factored = FactoredLinear(layer, fp16=False)
    factored.a = factored.a.flip(0)
    x = torch.randn(4, 48)
    assert not torch.allclose(factored(x), layer(x), rtol=0.05)
