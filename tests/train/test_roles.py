"""Roles and switches select what they say."""

from __future__ import annotations

import pytest
import torch

from lib.base.errors import ParamsError
from lib.model.linear import ParameterRole
from lib.model.surgery import quantized_layers
from lib.params.training import Rates
from lib.quant.spec import Codebook, ScaleForm
from lib.snap.snap import snap_model
from lib.train.roles import role_rates, select, settle_after, settle_before
from tests.tiny_models import quantized
from tests.train.samples import config

ATTENTION = {f"self_attn.{x}_proj" for x in "qkvo"}
MLP = {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
ALL = {f"model.layers.{block}.{part}" for block in (0, 1) for part in ATTENTION | MLP}
EVERY = Rates(weight=1e-4, scale_direction=1e-3, scale_magnitude=2e-3, lut=1e-2)


def selected(model: torch.nn.Module, **changes: object) -> tuple[set[str], set[str]]:
    """(layers, parameters inside a layer) that train."""
    chosen = select(model, config(**{"rates": EVERY, **changes}))
    by_gradient = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {item.name for item in chosen} == by_gradient
    layers = quantized_layers(model)
    for item in chosen:
        layer = next(n for n in layers if item.name.startswith(f"{n}."))
        assert item.layer is layers[layer]
        inside = item.name.removeprefix(f"{layer}.")
        assert item.parameter is layers[layer].get_parameter(inside)
        assert item.role is layers[layer].roles()[inside]
    split = [item.name.partition("_proj.") for item in chosen]
    return {f"{left}_proj" for left, _, _ in split}, {right for _, _, right in split}


@pytest.mark.parametrize(
    ("rates", "inside"),
    [
        (Rates(weight=1e-4), {"weight"}),
        (Rates(scale_direction=1e-3), {"scale.a", "scale.b"}),
        (Rates(scale_magnitude=1e-3), {"scale.g"}),  # magnitudes only
        (Rates(weight=1e-4, scale_direction=1e-3), {"weight", "scale.a", "scale.b"}),  # frozen g
        (Rates(lut=1e-3), {"lut"}),
        (EVERY, {"weight", "scale.a", "scale.b", "scale.g", "lut"}),
    ],
)
def test_rates_select_roles(rates: Rates, inside: set[str]) -> None:
    model = quantized(codebook=Codebook.LEARNED)
    assert selected(model, rates=rates) == (ALL, inside)
    # what an earlier stage trained is frozen again
    assert selected(model, rates=Rates(scale_magnitude=1e-3)) == (ALL, {"scale.g"})


@pytest.mark.parametrize("codebook", [c for c in Codebook if c is not Codebook.LEARNED])
def test_only_learned_luts_train(codebook: Codebook) -> None:
    assert "lut" not in selected(quantized(codebook=codebook))[1]


def test_biases_and_the_rest_never_train() -> None:
    model = quantized("qwen2", codebook=Codebook.LEARNED)
    assert selected(model)[1] == {"weight", "scale.a", "scale.b", "scale.g", "lut"}


@pytest.mark.parametrize(
    ("form", "inside"),
    [(ScaleForm.LOWRANK, {"scale.a", "scale.b"}), (ScaleForm.GROUP, {"scale.s"})],
)
def test_lowrank_and_group_have_no_magnitudes(form: ScaleForm, inside: set[str]) -> None:
    model = quantized(scale=form)
    assert selected(model)[1] == {"weight", *inside}
    assert selected(model, rates=Rates(scale_direction=1e-3)) == (ALL, inside)


def test_clip_factors_train_alone_or_with_the_rest() -> None:
    model = quantized(scale=ScaleForm.CHANNEL)
    assert selected(model)[1] == {"weight", "scale.s", "scale.f"}
    assert selected(model, rates=Rates(scale_magnitude=1e-3)) == (ALL, {"scale.f"})
    assert selected(model, rates=Rates(scale_direction=1e-3)) == (ALL, {"scale.s"})


def in_block(block: int, parts: set[str]) -> set[str]:
    return {f"model.layers.{block}.{part}" for part in parts}


def test_switches_select_layers() -> None:
    model = quantized()
    assert selected(model, train_mlp_only=True)[0] == in_block(0, MLP) | in_block(1, MLP)
    frozen = {name for name in ALL if name.endswith(("v_proj", "o_proj"))}
    assert len(frozen) == 4
    assert selected(model, freeze_value_output=True)[0] == ALL - frozen
    assert selected(model, freeze_last_mlp=1)[0] == ALL - in_block(1, MLP)
    assert selected(model, freeze_last_mlp=2)[0] == in_block(0, ATTENTION) | in_block(1, ATTENTION)
    both = selected(model, train_mlp_only=True, freeze_last_mlp=1)[0]
    assert both == in_block(0, MLP)


def test_nothing_to_train_is_an_error() -> None:
    for model, changes in (
        (quantized(), {"rates": Rates(lut=1e-3)}),
        (quantized(scale=ScaleForm.LOWRANK), {"rates": Rates(scale_magnitude=1e-3)}),
        (quantized(), {"train_mlp_only": True, "freeze_last_mlp": 2}),
    ):
        with pytest.raises(ParamsError, match="nothing trains"):
            selected(model, **changes)
    snapped = quantized()
    snap_model(snapped, baked=False)
    with pytest.raises(ParamsError, match="nothing trains"):
        selected(snapped, rates=Rates(weight=1e-4))


def test_role_rates() -> None:
    assert role_rates(config(rates=EVERY)) == {
        ParameterRole.WEIGHT: 1e-4,
        ParameterRole.SCALE_DIRECTION: 1e-3,
        ParameterRole.SCALE_MAGNITUDE: 2e-3,
        ParameterRole.LUT: 1e-2,
        ParameterRole.ADAPTER: 0.0,
        ParameterRole.FROZEN: 0.0,
    }


def test_settling_joins_masters_and_indices() -> None:
    model = quantized()
    name, layer = next(iter(quantized_layers(model).items()))
    assert layer.weight is not None
    chosen = select(model, config(rates=EVERY))
    with torch.no_grad():
        layer.scale.g.mul_(1.5)
    indices = layer.indices.clone()
    assert not torch.equal(layer.nearest_indices(), indices)
    settle_before(chosen)  # the masters follow the indices
    assert torch.equal(layer.nearest_indices(), indices)
    with torch.no_grad():
        layer.weight.neg_()
    settle_after(chosen)  # the indices follow the masters
    assert torch.equal(layer.nearest_indices(), layer.indices)
    assert not torch.equal(layer.indices, indices), name
    # without trained weights, neither moves
    scales = select(model, config(rates=Rates(scale_direction=1e-3)))
    before = layer.weight.detach().clone(), layer.indices.clone()
    with torch.no_grad():
        layer.scale.g.mul_(1.5)
    settle_before(scales)
    settle_after(scales)
    assert torch.equal(before[0], layer.weight) and torch.equal(before[1], layer.indices)
