"""Fisher scores against gradients of plain weights, written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError
from lib.cache.shards import CachedBatch, CacheReader
from lib.model.surgery import bake, quantized_layers
from lib.objective.distillation import LossSums, Objective, make_objective
from lib.sensitivity.fisher import drawn_rows, fisher_scores, mean_squares, smoothed
from tests.tiny_models import CPU, FAMILIES, quantized, readers, same, state_of

ROWS = [np.array([0, 3, 4]), np.array([9, 1, 2])]  # rows 0 and 4 are padded
TEMPERATURE = 2.0
LAST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def train(cache: Path) -> CacheReader:
    return readers(cache)[0]


@pytest.fixture(scope="module")
def objective(train: CacheReader) -> Objective:
    return make_objective(train, temperature=TEMPERATURE, target="candidates")


def slow_mean_squares(model: PreTrainedModel, batch: CachedBatch) -> dict[str, float]:
    """From full logits, position by position, with W_q as plain weights."""
    names = list(quantized_layers(model))
    bake(model)
    weights: dict[str, nn.Parameter] = {n: model.get_submodule(n).weight for n in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    logits = model(input_ids=batch.input_ids).logits.float()
    losses: list[Tensor] = []
    for row, position in batch.mask.nonzero().tolist():
        usable = batch.negative_mask[row, position]
        ids = torch.cat([batch.topk_ids[row, position], batch.negative_ids[row][usable]])
        known = torch.cat(
            [batch.topk_logprobs[row, position], batch.negative_logprobs[row, position][usable]]
        )
        t = (known / TEMPERATURE).log_softmax(dim=0)
        s = (logits[row, position, ids] / TEMPERATURE).log_softmax(dim=0)
        losses.append(TEMPERATURE**2 * (t.exp() * (t - s)).sum())
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()))
    squares = [gradient.double().square().mean() for gradient in gradients]
    return {name: float(value) for name, value in zip(names, squares, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lut_size", [4, 16])
def test_mean_squares_are_those_of_the_plain_weights(
    train: CacheReader, objective: Objective, family: str, lut_size: int
) -> None:
    batch = train.batch(ROWS[0])
    found = mean_squares(quantized(family, lut_size=lut_size), objective, batch)
    slow = slow_mean_squares(quantized(family, lut_size=lut_size), batch)
    assert list(found) == list(slow) and len(found) == 14
    assert found == pytest.approx(slow, rel=1e-3)
    assert min(found.values()) > 0


def test_scores_are_the_average_over_the_batches(train: CacheReader, objective: Objective) -> None:
    model = quantized(lut_size=4)
    first, second = (mean_squares(model, objective, train.batch(rows)) for rows in ROWS)
    found = fisher_scores(model, objective, train, ROWS, 0.95, CPU)
    for name, score in found.items():
        # e_2 / (1 - beta^2), e_2 = 0.05 (0.95 m_1 + m_2)
        assert score == pytest.approx((0.95 * first[name] + second[name]) / 1.95, rel=1e-9)
        assert first[name] != second[name]
    assert fisher_scores(model, objective, train, ROWS[:1], 0.95, CPU) == pytest.approx(first)


def test_what_cannot_reach_the_loss_has_no_score(train: CacheReader, objective: Objective) -> None:
    model = quantized()
    output = quantized_layers(model)["model.layers.1.self_attn.o_proj"]
    output.scale.g.data.zero_()  # attention of block 1 is cut off
    found = mean_squares(model, objective, train.batch(ROWS[0]))
    for kind in ("q_proj", "k_proj", "v_proj"):
        assert found[f"model.layers.1.self_attn.{kind}"] == 0
        assert found[f"model.layers.0.self_attn.{kind}"] > 0
    assert found["model.layers.1.self_attn.o_proj"] > 0


def test_the_model_stays_and_one_gradient_is_held(train: CacheReader, objective: Objective) -> None:
    model = quantized(lut_size=4)
    before = state_of(model)
    weights = {name: layer.weight for name, layer in quantized_layers(model).items()}
    held: list[int] = []
    watches = [
        weight.requires_grad_(True).register_post_accumulate_grad_hook(
            lambda _: held.append(sum(w.grad is not None for w in weights.values()))
        )
        for weight in weights.values()
    ]
    fisher_scores(model, objective, train, ROWS, 0.95, CPU)
    assert held == [1] * (2 * len(weights))
    for watch in watches:
        watch.remove()
    assert same(state_of(model), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(weight._post_accumulate_grad_hooks for weight in weights.values())


def scaled(objective: Objective, factors: list[float]) -> Any:
    """The objective with its total multiplied, call by call."""
    left = iter(factors)

    def call(model: PreTrainedModel, batch: CachedBatch) -> LossSums:
        sums = objective(model, batch)
        return dataclasses.replace(sums, total=sums.total * next(left))

    return call


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ([1.0, 1e30], rf"squared gradient of {LAST} is inf in batch 2 of 2"),
        ([1.0, float("nan")], r"loss is nan in batch 2 of 2"),
        ([float("inf")], r"loss is inf in batch 1 of 2"),
    ],
)
def test_gradients_and_losses_that_are_not_finite_are_named(
    train: CacheReader, objective: Objective, factors: list[float], words: str
) -> None:
    model = quantized()
    with pytest.raises(NonFiniteError, match=words):
        fisher_scores(model, scaled(objective, factors), train, ROWS, 0.95, CPU)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_layer_with_a_bad_output_is_named(
    train: CacheReader, objective: Objective
) -> None:
    model = quantized()
    layer = quantized_layers(model)["model.layers.0.mlp.up_proj"]
    layer.scale.a.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj is not finite in batch 1"):
        fisher_scores(model, objective, train, ROWS, 0.95, CPU)


@given(
    st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.5, 0.95, 0.999]),
)
def test_the_moving_average_is_the_formula(values: list[float], beta: float) -> None:
    found = smoothed(({"a": value, "b": 2 * value} for value in values), beta)
    weights = [beta ** (len(values) - 1 - index) for index in range(len(values))]
    plain = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert found["a"] == pytest.approx(plain, rel=1e-9)
    assert found["b"] == pytest.approx(2 * plain, rel=1e-9)
    if beta == 0:
        assert found["a"] == values[-1]


def test_one_batch_gives_its_own_value_and_none_nothing() -> None:
    assert smoothed([{"a": 0.25}], 0.95)["a"] == pytest.approx(0.25, rel=1e-14)
    assert smoothed([], 0.95) == {}


def test_rows_are_drawn_once_and_by_the_seed() -> None:
    rows = drawn_rows(64, batches=4, batch_size=4, seed=0)
    assert [len(batch) for batch in rows] == [4] * 4
    assert len(set(np.concatenate(rows).tolist())) == 16
    again = drawn_rows(64, batches=4, batch_size=4, seed=0)
    assert all(np.array_equal(one, other) for one, other in zip(rows, again, strict=True))
    assert not np.array_equal(rows[0], drawn_rows(64, batches=4, batch_size=4, seed=1)[0])
    few = drawn_rows(5, batches=4, batch_size=2, seed=0)
    assert [len(batch) for batch in few] == [2, 2, 1]
    assert sorted(np.concatenate(few).tolist()) == [*range(5)]
