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

RANKED = [ScaleForm.LOWRANK, ScaleForm.DIRECTIONAL]
CHANGES = [(before, after) for before in ScaleForm for after in RANKED]


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


def test_from_the_teacher_nothing_is_kept() -> None:
    """Whatever the model at more bits was, the result is the teacher quantized to the target."""
    teacher = {n: m.weight.detach() for n, m in projections(tiny_model()).items()}
    spec, found = target(), []
    for options in ({}, {"lut_size": 4}, {"scale": ScaleForm.GROUP}, {"rank": 12}):
        model = quantized(**options)
        use = importance(model)
        assert convert_model(model, spec, use, teacher) == {"converted": 14, "kept": 0}
        found.append(state_of(model))
    assert all(same(found[0], other) for other in found[1:])
    at_once = tiny_model()
    quantize_model(at_once, spec, use)
    assert same(found[0], state_of(at_once))
    with pytest.raises(ParamsError, match="does not drop ranks"):  # as it must where layers stay
        convert_model(quantized(rank=12), spec, use)


@pytest.mark.parametrize(("before", "after"), CHANGES)
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


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_without_fp16_the_change_of_form_is_exact(before: ScaleForm, after: ScaleForm) -> None:
    model = quantized(lut_size=4, scale=before, group_size=20, ste_fp16=False)
    old = weights(model)
    spec = target({"scale": after}, {"scale": after, "lut_size": 4})
    convert_model(model, spec, importance(model))
    for name, new in weights(model).items():
        assert torch.allclose(new, old[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [16, 20, 100])
def test_group_scales_stay_exactly_as_they_are(size: int) -> None:
    options = {"scale": ScaleForm.GROUP, "group_size": size}
    model = quantized(lut_size=4, **options)
    before, specs = state_of(model), {n: x.spec for n, x in quantized_layers(model).items()}
    spec = target({**options, "rank": 1}, {**options, "lut_size": 4})  # the rank means nothing
    assert convert_model(model, spec, importance(model)) == {"converted": 0, "kept": 14}
    assert same(before, state_of(model))
    assert specs == {n: x.spec for n, x in quantized_layers(model).items()}


def test_channel_scales_stay_exactly_as_they_are() -> None:
    model = quantized(lut_size=4, scale=ScaleForm.CHANNEL)
    before, specs = state_of(model), {n: x.spec for n, x in quantized_layers(model).items()}
    options = {"scale": ScaleForm.CHANNEL, "group_size": 8, "rank": 1}  # neither means anything
    spec = target(options, {**options, "lut_size": 4})
    assert convert_model(model, spec, importance(model)) == {"converted": 0, "kept": 14}
    assert same(before, state_of(model))
    assert specs == {n: x.spec for n, x in quantized_layers(model).items()}


@pytest.mark.parametrize("after", [ScaleForm.GROUP, ScaleForm.CHANNEL])
@pytest.mark.parametrize("before", list(ScaleForm))
def test_fewer_levels_may_have_any_form(before: ScaleForm, after: ScaleForm) -> None:
    """Each MLP becomes what :meth:`LutLinear.from_weight` makes of its present weight."""
    model = quantized(scale=before)
    old, use = weights(model), importance(model)
    spec = target({"scale": after, "group_size": 20}, {"scale": ScaleForm.DIRECTIONAL})
    assert convert_model(model, spec, use) == {"converted": 6, "kept": 8}
    for name, layer in quantized_layers(model).items():
        if is_mlp(name):
            fresh = LutLinear.from_weight(old[name], None, spec.mlp, name, use[name])
            assert same(dict(layer.state_dict()), dict(fresh.state_dict()))
            assert layer.spec == spec.mlp


@pytest.mark.parametrize("form", RANKED)
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


@pytest.mark.parametrize("form", [ScaleForm.DIRECTIONAL, ScaleForm.GROUP, ScaleForm.CHANNEL])
@pytest.mark.parametrize("codebook", list(Codebook))
@pytest.mark.parametrize("size", [2, 8])
def test_any_size_and_codebook(codebook: Codebook, size: int, form: ScaleForm) -> None:
    model = quantized()
    change = {"lut_size": size, "codebook": codebook, "scale": form}
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


def test_reference_rule_keeps_group_scales() -> None:
    """As ranks; a target of more groups counts as a target of more ranks."""
    model = quantized(scale=ScaleForm.GROUP, ste_fp16=False)
    name = "model.layers.0.mlp.down_proj"
    a, b = quantized_layers(model)[name].factors()
    options = {"scale": ScaleForm.GROUP, "group_size": 8}
    convert_by_reference_rule(model, target(options, {}))
    layer = quantized_layers(model)[name]
    assert layer.scale.g.numel() == 64 // 8 and (layer.scale.g[4:] == 0.01).all()
    new_a, new_b = layer.factors()
    assert torch.allclose(new_a[:, :4] @ new_b[:4], a @ b, rtol=1e-5)


GROUPS: dict[str, Any] = {"scale": ScaleForm.GROUP}


@pytest.mark.parametrize(
    ("before", "mlp", "attention", "words"),
    [
        (
            {},
            {},
            GROUPS,
            r"convert\.scale group .* scales of .*q_proj, .* 16 levels; use convert\.scale "
            r"directional, or a convert\.attention_lut_size below 16",
        ),
        (
            {"lut_size": 4, "scale": ScaleForm.LOWRANK},
            GROUPS,
            {"lut_size": 4},
            r"gate_proj, .* 4 levels; use convert\.scale lowrank, or a convert\.lut_size below 4",
        ),
        (
            {**GROUPS, "group_size": 8},
            GROUPS,
            GROUPS,
            r"convert\.group_size 16 .*use convert\.group_size 8, or a convert\.attention_lut_size",
        ),
        (
            {**GROUPS, "group_size": 6},
            {},
            {"rank": 5},
            r"convert\.attention_rank 5 is below the 6 groups .*q_proj .*at least 6",
        ),
        (
            {**GROUPS, "lut_size": 4},
            {"scale": ScaleForm.CHANNEL},
            {"lut_size": 4},
            r"convert\.scale channel .*gate_proj, .* 4 levels; use convert\.scale group, or a",
        ),
        (
            {"scale": ScaleForm.CHANNEL},
            {},
            GROUPS,
            r"convert\.scale group .*q_proj, .* 16 levels; use convert\.scale channel, or a",
        ),
    ],
)
def test_scales_that_stay_cannot_take_any_form(
    before: dict[str, Any], mlp: dict[str, Any], attention: dict[str, Any], words: str
) -> None:
    model = quantized(**before)
    state = state_of(model)
    with pytest.raises(ParamsError, match=words) as caught:
        convert_model(model, target(mlp, attention), importance(model))
    assert "\n" not in str(caught.value)
    assert same(state, state_of(model))  # refused before anything was done


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
