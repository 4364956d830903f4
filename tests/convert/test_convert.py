"""Conversion to fewer levels and more ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.base.errors import InputError, ParamsError
from lib.convert.convert import convert_by_reference_rule, convert_model
from lib.model.linear import LutLinear
from lib.model.surgery import is_mlp, projections, quantize_model, quantized_layers
from lib.quant.refit import weighted_error
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm
from tests.tiny_models import linear_spec, quantized, same, state_of, tiny_model


def target(mlp: dict[str, Any] | None = None, attention: dict[str, Any] | None = None) -> ModelSpec:
    """The default conversion in small: MLPs to 4 levels, attention keeps 16; ranks double."""
    plain = {"rank": 8, "refit_steps": 3}
    return ModelSpec(
        mlp=linear_spec(**{**plain, "lut_size": 4, **(mlp or {})}),
        attention=linear_spec(**{**plain, **(attention or {})}),
    )


def importance(model: torch.nn.Module) -> dict[str, Tensor]:
    """Some use of every input."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(layer.in_features, generator=generator).pow(3)
        for name, layer in projections(model).items()
        if isinstance(layer, LutLinear)
    }


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: layer.dequantized() for name, layer in quantized_layers(model).items()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_specs_counts_and_biases(family: str) -> None:
    model, spec = quantized(family), target()
    biases = {n: layer.bias for n, layer in quantized_layers(model).items()}
    assert convert_model(model, spec, importance(model)) == {"converted": 6, "kept": 8}
    for name, layer in quantized_layers(model).items():
        assert layer.spec.lut_size == (4 if is_mlp(name) else 16)
        assert layer.spec.rank == 8 and layer.lut.numel() == layer.spec.lut_size
        assert layer.indices.max() < layer.spec.lut_size
        old = biases[name]
        assert (layer.bias is None) is (old is None)
        assert old is None or torch.equal(layer.bias, old)
        assert layer.weight is not None


@pytest.mark.parametrize("before", list(ScaleForm))
@pytest.mark.parametrize("after", list(ScaleForm))
@pytest.mark.parametrize("codebook", list(Codebook))
def test_layers_with_few_levels_pass_unharmed(
    before: ScaleForm, after: ScaleForm, codebook: Codebook
) -> None:
    """`quant.lut_size=4` from the start: only the form of S and its rank change."""
    model = quantized(lut_size=4, scale=before, codebook=codebook)
    old, state = weights(model), state_of(model)
    spec = target({"scale": after}, {"scale": after, "lut_size": 4})
    assert convert_model(model, spec, importance(model)) == {"converted": 0, "kept": 14}
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.indices, state[f"{name}.indices"])
        assert torch.equal(layer.lut, state[f"{name}.lut"])
        assert torch.equal(layer.weight, state[f"{name}.weight"])
        assert layer.spec.codebook is codebook and layer.spec.scale is after
        # A and B were rounded to FP16 before and are anew: half a spacing each, twice
        assert weighted_error(old[name], layer.dequantized(), torch.ones(1)) < (2**-10) ** 2


def test_without_fp16_the_change_of_form_is_exact() -> None:
    model = quantized(lut_size=4, scale=ScaleForm.LOWRANK, ste_fp16=False)
    old = weights(model)
    convert_model(model, target({}, {"lut_size": 4}), importance(model))
    for name, new in weights(model).items():
        assert torch.allclose(new, old[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", list(ScaleForm))
def test_added_ranks_are_silent_but_can_train(form: ScaleForm) -> None:
    model = quantized(lut_size=4)
    convert_model(model, target({"scale": form}, {"lut_size": 4}), importance(model))
    layer = quantized_layers(model)["model.layers.0.mlp.up_proj"]
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.scale.parameters():
        parameter.requires_grad_(True)
    (layer(torch.eye(32)) * torch.randn(32, 64, generator=generator)).sum().backward()
    leader = layer.scale.a if form is ScaleForm.LOWRANK else layer.scale.g
    assert leader.grad is not None
    assert (leader.grad[..., 4:].abs().amax(dim=0) > 0).all()


def test_fewer_levels_are_fitted_to_what_the_layer_computed() -> None:
    model, use = quantized(), importance(quantized())
    old = weights(model)
    rival = quantized()
    convert_model(model, target(), use)
    convert_by_reference_rule(rival, target())
    plain = quantized()
    convert_model(plain, target({"refit_steps": 0}), use)
    for name, new in weights(model).items():
        if is_mlp(name):
            lost = [
                weighted_error(old[name], candidate, use[name])
                for candidate in (new, weights(plain)[name], weights(rival)[name])
            ]
            assert lost[0] < 0.8 * min(lost[1:])
            assert torch.equal(quantized_layers(model)[name].weight, old[name])


def test_importance_weighs_the_fit() -> None:
    errors = []
    use = importance(quantized())
    name = "model.layers.1.mlp.down_proj"
    for weighting in (use, {n: torch.ones_like(v) for n, v in use.items()}):
        model = quantized()
        old = weights(model)[name]
        convert_model(model, target(), weighting)
        errors.append(weighted_error(old, weights(model)[name], use[name]))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("codebook", list(Codebook))
@pytest.mark.parametrize("size", [2, 8])
def test_any_size_and_codebook(codebook: Codebook, size: int) -> None:
    model = quantized()
    change = {"lut_size": size, "codebook": codebook}
    counts = convert_model(model, target(change, change), importance(model))
    assert counts == {"converted": 14, "kept": 0}
    for layer in quantized_layers(model).values():
        assert (layer.spec.lut_size, layer.spec.codebook) == (size, codebook)
        assert layer.dequantized().isfinite().all()
        assert (layer.levels().half().diff() > 0).all()


def test_conversion_is_seeded() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # the global generator must not matter
        model = quantized()
        convert_model(model, replace(target(), seed=seed), importance(model))
        states.append(state_of(model))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_reference_rule() -> None:
    """K-means on the LUT's values, S kept, added ranks of magnitude 0.01."""
    model = quantized(ste_fp16=False)
    old, before = weights(model), state_of(model)
    convert_by_reference_rule(model, target())
    layer = quantized_layers(model)["model.layers.0.mlp.up_proj"]
    assert torch.allclose(layer.lut, torch.tensor([-0.8, -4 / 15, 4 / 15, 0.8]), atol=1e-3)
    old_indices = before["model.layers.0.mlp.up_proj.indices"]
    assert torch.equal(layer.indices, old_indices // 4)
    assert torch.allclose(layer.scale.g[4:], torch.full((4,), 0.01))
    a, b = layer.factors()
    scale = a[:, :4] @ b[:4]
    levels = before["model.layers.0.mlp.up_proj.lut"][old_indices.long()]
    assert torch.allclose(levels * scale, old["model.layers.0.mlp.up_proj"], atol=1e-5)
    assert quantized_layers(model)["model.layers.0.self_attn.q_proj"].spec.lut_size == 16


def test_refusals() -> None:
    with pytest.raises(InputError, match="no quantized layer to convert"):
        convert_model(tiny_model(), target(), {})
    for mlp, attention, key in (
        ({}, {"rank": 3}, r"convert\.attention_rank 3 .*rank 4 .*self_attn.*at least 4"),
        ({"rank": 2, "lut_size": 16}, {}, r"convert\.rank 2 .*mlp"),
    ):
        model = quantized()
        before = state_of(model)
        with pytest.raises(ParamsError, match=key):
            convert_model(model, target(mlp, attention), importance(model))
        assert same(before, state_of(model))  # refused before anything was done
    model = quantized()
    with pytest.raises(ParamsError, match=r"rank 17 .*k_proj \[16, 32\]"):
        convert_model(model, target({}, {"rank": 17}), importance(model))


def test_only_mlps_quantized() -> None:
    model = tiny_model()
    spec: LinearSpec = linear_spec()
    quantize_model(model, ModelSpec(mlp=spec, attention=None))
    assert convert_model(model, target(), importance(model)) == {"converted": 6, "kept": 0}
