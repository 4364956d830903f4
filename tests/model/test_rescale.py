"""Scaling the residual stream: the same function, the same indices, and a smaller stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    PreTrainedModel,
)

from lib.base.errors import InputError
from lib.model.rescale import choose_alpha, is_tied, residual_stream, scale_residual
from lib.model.surgery import quantized_layers
from lib.quant.spec import ScaleForm
from lib.snap.snap import snap_model
from tests.capture.tiny import tiny_config
from tests.tiny_models import FAMILIES, logits_of, quantized, tiny_model

ALPHA = 2.0**-5
EXACT = 1e-6  # of the largest logit


def _difference(model: PreTrainedModel) -> float:
    before = logits_of(model)
    scale_residual(model, ALPHA)
    return float((logits_of(model) - before).abs().max() / before.abs().max())


def _norm_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The input of every norm that reads the stream."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0]})
        )
        for name in residual_stream(model).readers
    ]
    logits_of(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ScaleForm)
def test_the_function_and_the_indices_stay(family: str, form: ScaleForm) -> None:
    model = quantized(family, scale=form)
    snap_model(model, baked=False)
    before = {name: layer.indices.clone() for name, layer in quantized_layers(model).items()}
    luts = {name: layer.lut.clone() for name, layer in quantized_layers(model).items()}
    assert _difference(model) < EXACT
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.indices, before[name])
        assert torch.equal(layer.lut, luts[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_models_as_well(family: str) -> None:
    assert _difference(tiny_model(family)) < EXACT


def test_masters_keep_their_indices() -> None:
    model = quantized()
    scale_residual(model, ALPHA)
    for layer in quantized_layers(model).values():
        assert torch.equal(layer.nearest_indices(), layer.indices)


def test_the_stream_is_smaller_by_alpha() -> None:
    model = quantized()
    before = _norm_inputs(model)
    scale_residual(model, ALPHA)
    after = _norm_inputs(model)
    assert len(before) == 5
    for name, value in before.items():
        assert torch.allclose(after[name], value * ALPHA, rtol=1e-5, atol=1e-7)


def test_and_back() -> None:
    model = quantized("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale_residual(model, ALPHA)
    scale_residual(model, 1 / ALPHA)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_head_is_made_up_for_in_the_last_gain() -> None:
    tied, untied = tiny_model("qwen3"), tiny_model("llama")
    gains = [m.model.norm.weight.clone() for m in (tied, untied)]
    for model in (tied, untied):
        scale_residual(model, ALPHA)
    assert is_tied(tied)
    assert not is_tied(untied)
    assert torch.equal(tied.model.norm.weight, gains[0] / ALPHA)
    assert torch.equal(untied.model.norm.weight, gains[1])


@pytest.mark.parametrize("part", ["eps", "writer", "embedding"])
def test_every_part_is_needed(part: str) -> None:
    """Negative control: without one part of the rescaling the function is another one."""
    model = tiny_model()
    before = logits_of(model)
    scale_residual(model, 2.0**-8)
    with torch.no_grad():
        if part == "eps":
            model.model.layers[0].input_layernorm.variance_epsilon *= 2.0**16
        elif part == "writer":
            model.model.layers[0].mlp.down_proj.weight.mul_(2.0**8)
        else:
            model.get_input_embeddings().weight.mul_(2.0**8)
    assert (logits_of(model) - before).abs().max() > 1e-5 * before.abs().max()


def _gemma(config: Any, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(config, head_dim=8, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def test_a_gain_stored_as_w_minus_1() -> None:
    model = _gemma(GemmaConfig, tie_word_embeddings=True)
    assert is_tied(model)
    assert _difference(model) < EXACT


def test_norms_behind_the_projections_are_refused() -> None:
    model = _gemma(Gemma3TextConfig)
    before = logits_of(model)
    with pytest.raises(InputError, match="pre_feedforward_layernorm"):
        scale_residual(model, ALPHA)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("alpha", [0.3, 0.0, -0.5, 3.0])
def test_alpha_is_a_power_of_two(alpha: float) -> None:
    with pytest.raises(ValueError, match="power of two"):
        scale_residual(tiny_model(), alpha)


@pytest.mark.parametrize(
    ("peaks", "limit", "alpha"),
    [
        ([100.0, 3.0], 128.0, 1.0),
        ([128.0], 128.0, 1.0),
        ([129.0], 128.0, 0.5),
        ([24500.0, 1.0], 127.0, 2.0**-8),
        ([127.0 * 256], 127.0, 2.0**-8),
        ([], 127.0, 1.0),
    ],
)
def test_choose_alpha(peaks: list[float], limit: float, alpha: float) -> None:
    assert choose_alpha(peaks, limit) == alpha


@pytest.mark.parametrize("peak", [float("inf"), float("nan")])
def test_no_alpha_for_what_is_not_finite(peak: float) -> None:
    with pytest.raises(ValueError, match="no alpha helps"):
        choose_alpha([1.0, peak], 127.0)
