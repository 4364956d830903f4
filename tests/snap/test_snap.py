"""Snapping changes storage and nothing else."""

from __future__ import annotations

import pytest
import torch

from lib.base.errors import GateError, InputError
from lib.model.linear import LutLinear
from lib.model.surgery import quantized_layers
from lib.quant.fp16 import is_fp16_exact
from lib.quant.spec import Codebook, ScaleForm
from lib.snap.snap import snap_layer, snap_model
from tests.tiny_models import logits_of, quantized, same, state_of, tiny_model

LAYER = "model.layers.0.mlp.gate_proj"


def shaken(model: torch.nn.Module) -> None:
    """Scales and learned LUTs as training leaves them: not FP16-exact, directions not unit."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            learned = [layer.lut] if layer.spec.codebook is Codebook.LEARNED else []
            for parameter in (*layer.scale.parameters(), *learned):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.01 * noise)


@pytest.mark.parametrize("codebook", [Codebook.UNIFORM, Codebook.LEARNED])
@pytest.mark.parametrize("form", list(ScaleForm))
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_snapped_computes_the_same_bit_for_bit_and_idempotently(
    family: str, form: ScaleForm, codebook: Codebook
) -> None:
    model = quantized(family, scale=form, codebook=codebook, lut_size=4)
    shaken(model)
    weights = {n: layer.dequantized() for n, layer in quantized_layers(model).items()}
    before = logits_of(model)
    assert snap_model(model, baked=False) == {"layers": 14, "largest_change": 0.0}
    for name, layer in quantized_layers(model).items():
        assert layer.weight is None
        assert torch.equal(layer.dequantized(), weights[name])
    assert torch.equal(logits_of(model), before)
    assert all(is_fp16_exact(parameter) for parameter in model.parameters())
    once = state_of(model)
    assert snap_model(model, baked=False)["largest_change"] == 0.0
    assert same(once, state_of(model))


def test_without_ste_fp16_the_change_is_reported() -> None:
    model = quantized(ste_fp16=False)
    shaken(model)
    old = {n: layer.dequantized() for n, layer in quantized_layers(model).items()}
    change = snap_model(model, baked=False)["largest_change"]
    slow = max(
        float((x.dequantized() - old[n]).abs().max()) for n, x in quantized_layers(model).items()
    )
    assert change == slow > 0
    largest = max(float(w.abs().max()) for w in old.values())
    assert change < 2**-8 * largest


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_baked_is_the_rounded_weight(family: str) -> None:
    model = quantized(family)
    old = {n: layer.dequantized() for n, layer in quantized_layers(model).items()}
    report = snap_model(model, baked=True)
    assert not quantized_layers(model)
    for name, weight in old.items():
        assert torch.equal(model.get_submodule(name).weight, weight.half().float())
    assert report["largest_change"] == max(
        float((w.half().float() - w).abs().max()) for w in old.values()
    )
    assert all(is_fp16_exact(parameter) for parameter in model.parameters())


def test_indices_out_of_range_are_refused() -> None:
    model = quantized(lut_size=4)
    layer = quantized_layers(model)[LAYER]
    layer.indices[3, 5] = 4
    with pytest.raises(GateError, match=rf"{LAYER} has index 4, its LUT has 4 entries"):
        snap_model(model, baked=False)


@pytest.mark.parametrize("value", [65520.0, -1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["scale.g", "scale.a", "lut", "bias"])
def test_values_that_fp16_cannot_hold_are_refused_by_name(part: str, value: float) -> None:
    layer = quantized_layers(quantized("qwen2"))["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        layer.get_parameter(part).view(-1)[-1] = value
    if part == "scale.a" and abs(value) < float("inf"):
        snap_layer(layer, "q_proj")  # a direction is normalized first
        return
    with pytest.raises(GateError, match=rf"q_proj\.{part}|q_proj\.scale|equal in FP16"):
        snap_layer(layer, "q_proj")


def test_the_rest_of_the_model_is_checked_too() -> None:
    model = quantized()
    with torch.no_grad():
        model.model.norm.weight[1] = 1e6
    with pytest.raises(GateError, match=r"model\.norm\.weight holds 1e\+06, .*65504"):
        snap_model(model, baked=False)


def test_equal_levels_are_refused() -> None:
    layer = quantized_layers(quantized(codebook=Codebook.LEARNED))[LAYER]
    with torch.no_grad():
        layer.lut[4] = layer.lut[3] * (1 + 2**-13)
    with pytest.raises(GateError, match="equal in FP16"):
        snap_layer(layer, LAYER)


def test_nothing_to_snap_is_an_error() -> None:
    with pytest.raises(InputError, match="no quantized layer to snap"):
        snap_model(tiny_model(), baked=False)


def test_the_layer_itself_is_left_alone() -> None:
    layer = quantized_layers(quantized())[LAYER]
    before = {n: v.clone() for n, v in layer.state_dict().items()}
    snapped = snap_layer(layer, LAYER)
    assert isinstance(snapped, LutLinear) and snapped is not layer
    assert same(before, dict(layer.state_dict()))
