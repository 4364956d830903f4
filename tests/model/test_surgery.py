"""Which modules are replaced, by what, and what happens to the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.base.errors import InputError, ParamsError
from lib.model.calibrate import input_moments
from lib.model.linear import LutLinear, ParameterRole
from lib.model.surgery import (
    bake,
    block_number,
    is_mlp,
    parameter_roles,
    projections,
    quantize_model,
    quantized_layers,
)
from lib.quant.spec import ModelSpec
from tests.tiny_models import (
    linear_spec,
    logits_of,
    model_spec,
    quantized,
    random_rows,
    same,
    state_of,
    tiny_model,
)

NAMES = [
    f"model.layers.{block}.{part}"
    for block in range(2)
    for part in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
]


def test_names() -> None:
    assert is_mlp("model.layers.0.mlp.gate_proj") and not is_mlp("model.layers.0.self_attn.o_proj")
    assert block_number("model.layers.17.mlp.up_proj") == 17
    with pytest.raises(InputError, match="lm_head is not inside"):
        block_number("lm_head")


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_every_projection_and_nothing_else_is_quantized(family: str) -> None:
    model = tiny_model(family)
    assert sorted(projections(model)) == sorted(NAMES)
    before = logits_of(model)
    quantize_model(model, model_spec())
    layers = quantized_layers(model)
    assert sorted(layers) == sorted(NAMES)
    assert sorted(projections(model)) == sorted(NAMES)  # quantized ones count too
    assert isinstance(model.lm_head, nn.Linear)
    after = logits_of(model)
    assert 0 < (after - before).norm() / before.norm() < 0.5
    biased = {name for name, layer in layers.items() if layer.bias is not None}
    assert biased == {n for n in NAMES if family == "qwen2" and n[-6] in "qkv"}


def test_attention_can_stay_or_differ() -> None:
    model = tiny_model()
    quantize_model(model, ModelSpec(mlp=linear_spec(), attention=None))
    assert sorted(quantized_layers(model)) == sorted(n for n in NAMES if is_mlp(n))
    model = tiny_model()
    quantize_model(model, ModelSpec(mlp=linear_spec(lut_size=4), attention=linear_spec(rank=2)))
    for name, layer in quantized_layers(model).items():
        assert (layer.spec.lut_size, layer.spec.rank) == ((4, 4) if is_mlp(name) else (16, 2))


def test_the_rest_is_rounded_to_fp16_only_with_ste() -> None:
    plain = state_of(tiny_model("qwen2"))
    for ste_fp16 in (True, False):
        model = quantized("qwen2", ste_fp16=ste_fp16)
        biases = {f"{n}.bias" for n in quantized_layers(model)}
        rest = {
            n: v
            for n, v in model.state_dict().items()
            if n in plain and not n.endswith("proj.weight")
        }
        assert biases & rest.keys() and "lm_head.weight" in rest
        for name, value in rest.items():
            expected = plain[name].half().float() if ste_fp16 else plain[name]
            assert torch.equal(value, expected), name
        for name, layer in quantized_layers(model).items():  # masters keep float32
            assert layer.weight is not None
            assert torch.equal(layer.weight.detach(), plain[f"{name}.weight"])


def test_values_beyond_fp16_are_refused_by_name() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 70000.0
    with pytest.raises(InputError, match=r"model\.norm\.weight holds 70000, .*65504"):
        quantize_model(model, model_spec())
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 70000.0
    quantize_model(model, model_spec(ste_fp16=False))


def test_refusals() -> None:
    with pytest.raises(InputError, match="no q/k/v/o"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), model_spec())
    # k and v have 16 outputs
    with pytest.raises(ParamsError, match=r"rank 20 .*layers\.0\.self_attn\.k_proj \[16, 32\]"):
        quantize_model(tiny_model(), model_spec(rank=20))


def test_importance_reaches_its_layer() -> None:
    rows = random_rows(8, "train", 0)
    importance = input_moments(
        tiny_model(),
        torch.from_numpy(rows.input_ids).long(),
        torch.from_numpy(rows.lengths),
        full=False,
    )
    model, spec = tiny_model(), linear_spec(lut_size=4, refit_steps=2)
    quantize_model(model, ModelSpec(mlp=spec, attention=spec), importance)
    name = NAMES[5]
    alone = LutLinear.from_weight(
        tiny_model().get_submodule(name).weight, None, spec, name, importance[name]
    )
    assert same(state_of(quantized_layers(model)[name]), state_of(alone))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_baking_keeps_every_bit(family: str) -> None:
    model = quantized(family)
    before = logits_of(model)
    bake(model)
    assert not quantized_layers(model)
    assert sorted(projections(model)) == sorted(NAMES)
    assert torch.equal(logits_of(model), before)


def test_parameter_roles_cover_every_parameter() -> None:
    model = quantized("qwen3")
    roles = parameter_roles(model)
    assert roles.keys() == {name for name, _ in model.named_parameters()}
    assert roles[f"{NAMES[0]}.weight"] is ParameterRole.WEIGHT
    assert roles[f"{NAMES[0]}.scale.g"] is ParameterRole.SCALE_MAGNITUDE
    rest = [role for name, role in roles.items() if "_proj." not in name]
    assert rest and set(rest) == {ParameterRole.FROZEN}
