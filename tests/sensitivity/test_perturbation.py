"""What quantizing one layer alone costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError
from lib.model.linear import LutLinear
from lib.model.surgery import projections, quantized_layers, replace_module
from lib.objective.distillation import make_objective
from lib.objective.loss import held_out_loss
from lib.sensitivity.perturbation import perturbation_scores
from tests.tiny_models import CPU, linear_spec, quantized, readers, same, state_of, tiny_model

Measure = Callable[[PreTrainedModel], float]
COARSE = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]


@pytest.fixture(scope="module")
def measure(cache: Path) -> Measure:
    """The held-out KD loss on eight sequences."""
    _, val = readers(cache)
    objective = make_objective(val, temperature=2.0, target="candidates")
    return lambda model: held_out_loss(model, objective, val, 8, CPU)


def coarse(model: PreTrainedModel, name: str) -> LutLinear:
    """A layer of ``model`` with two levels."""
    plain = projections(model)[name]
    assert isinstance(plain, nn.Linear)
    return LutLinear.from_weight(plain.weight, plain.bias, linear_spec(lut_size=2), name)


@pytest.mark.parametrize("name", COARSE)
def test_the_coarsest_layer_is_the_most_sensitive(measure: Measure, name: str) -> None:
    model = tiny_model()
    layers = quantized_layers(quantized())
    fine = perturbation_scores(model, layers, measure)
    scores = perturbation_scores(model, {**layers, name: coarse(model, name)}, measure)
    assert max(scores, key=lambda key: scores[key]) == name
    assert scores[name] > 4 * fine[name]  # and without its two levels it would not be
    assert {**scores, name: 0} == {**fine, name: 0}


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has biases
def test_each_score_is_that_of_a_model_with_one_quantized_layer(
    measure: Measure, family: str
) -> None:
    layers = quantized_layers(quantized(family, lut_size=4))
    scores = perturbation_scores(tiny_model(family), layers, measure)
    assert list(scores) == list(layers) == list(projections(tiny_model(family)))
    full = measure(tiny_model(family))
    for name in (COARSE[0], "model.layers.1.self_attn.q_proj"):
        alone = tiny_model(family)
        replace_module(alone, name, layers[name])
        assert scores[name] == measure(alone) - full


def test_the_model_is_as_it_was(measure: Measure) -> None:
    model = tiny_model()
    before, modules = state_of(model), projections(model)
    seen: list[int] = []

    def counting(candidate: PreTrainedModel) -> float:
        seen.append(len(quantized_layers(candidate)))
        return measure(candidate)

    perturbation_scores(model, quantized_layers(quantized()), counting)
    assert seen == [0] + [1] * 14  # never two at a time
    assert same(state_of(model), before)
    after = projections(model)
    assert after.keys() == modules.keys() and all(after[n] is modules[n] for n in after)


def test_a_loss_that_is_not_finite_names_its_layer(measure: Measure) -> None:
    model, layers = tiny_model(), quantized_layers(quantized())
    before = state_of(model)
    layers[COARSE[1]].scale.a.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"loss is nan with only .*1\.self_attn\.v_proj"):
        perturbation_scores(model, layers, measure)
    assert same(state_of(model), before)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="nan with nothing quantized"):
        perturbation_scores(model, layers, measure)
