"""Losses of one block against what is written out here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.model.blocks import decoder_blocks, part
from lib.objective.distillation import Objective, make_objective
from lib.objective.local import (
    BlockBatches,
    BlockLoss,
    LayerLoss,
    TailBatches,
    reconstruction,
)
from tests.tiny_models import make_caches, quantized, readers, tiny_model

ROWS = np.array([0, 5, 3])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_caches(tmp_path_factory.mktemp("cache"), rows=8)


def test_reconstruction_is_the_formula() -> None:
    found, wanted = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    normalized = relative_up = relative_down = 0.0
    for f, w in zip(found.tolist(), wanted.tolist(), strict=True):
        rms_f = (sum(v * v for v in f) / 5 + 1e-6) ** 0.5
        rms_w = (sum(v * v for v in w) / 5 + 1e-6) ** 0.5
        normalized += sum((a / rms_f - b / rms_w) ** 2 for a, b in zip(f, w, strict=True)) / 35
        relative_up += sum((a - b) ** 2 for a, b in zip(f, w, strict=True))
        relative_down += sum(b * b for b in w)
    expected = 0.8 * normalized + 0.2 * relative_up / relative_down
    assert float(reconstruction(found, wanted)) == pytest.approx(expected)
    assert float(reconstruction(wanted, wanted)) == 0.0


def layer_loss(objective: Objective, block: int = 1, **changes: object) -> LayerLoss:
    mlp = decoder_blocks(tiny_model())[block].mlp
    values = {"local_weight": 0.5, "global_weight": 0.25, "tokens": 10_000, **changes}
    return LayerLoss(objective=objective, block=block, mlp=mlp, **values)  # type: ignore[arg-type]


@torch.no_grad()
def hidden_before(model: object, ids: Tensor, block: int) -> Tensor:
    hidden: Tensor = model.get_input_embeddings()(ids)  # type: ignore[attr-defined]
    if block:
        hidden = part(model, 0, block, norm=False)(inputs_embeds=hidden).last_hidden_state  # type: ignore[arg-type]
    return hidden


def test_layer_loss_is_its_terms(cache: Path) -> None:
    train, _ = readers(cache)
    objective = make_objective(
        train, temperature=2.0, target="candidates", hard_top1_weight=0.1, hard_full_weight=0.01
    )
    student = quantized(lut_size=4)
    batches = TailBatches(train, hidden_before(student, train.sequences(8)[0], 1).numpy())
    batch = batches.batch(ROWS)
    found = layer_loss(objective)(student, batch)
    whole = objective(student, train.batch(ROWS))
    kd_only = objective.measured()(student, train.batch(ROWS))
    assert float(found.held) == pytest.approx(float(whole.held), rel=1e-5)
    # the MLP's input and output, from a hook on the whole model
    seen: dict[str, Tensor] = {}
    decoder_blocks(student)[1].mlp.register_forward_hook(
        lambda _m, inputs, output: seen.update(x=inputs[0], y=output)
    )
    with torch.no_grad():
        student(input_ids=batch.cached.input_ids, use_cache=False)
        wanted = decoder_blocks(tiny_model())[1].mlp(seen["x"])
    real = batch.mask
    local = reconstruction(seen["y"][:, :-1][real], wanted[:, :-1][real])
    hard = float(whole.total.detach()) - float(kd_only.total.detach())
    expected = 0.25 * float(whole.held) + hard + 0.5 * float(local) * int(whole.count)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-4)


def test_only_the_kd_term_is_measured(cache: Path) -> None:
    train, _ = readers(cache)
    objective = make_objective(train, temperature=2.0, target="candidates", hard_top1_weight=0.1)
    student = quantized(lut_size=4)
    batches = TailBatches(train, hidden_before(student, train.sequences(8)[0], 1).numpy())
    sums = layer_loss(objective).measured()(student, batches.batch(ROWS))
    assert float(sums.total.detach()) == pytest.approx(float(sums.held))


def test_tokens_are_sampled_anew_and_seeded(cache: Path) -> None:
    train, _ = readers(cache)
    objective = make_objective(train, temperature=2.0, target="candidates")
    student = quantized(lut_size=4)
    batches = TailBatches(train, hidden_before(student, train.sequences(8)[0], 1).numpy())
    loss = layer_loss(objective, tokens=4)

    def total() -> float:
        return float(loss(student, batches.batch(ROWS)).total.detach())

    torch.manual_seed(1)
    first, second = total(), total()
    assert first != second
    torch.manual_seed(1)
    assert total() == first


def test_the_local_term_reaches_the_layer_alone(cache: Path) -> None:
    train, _ = readers(cache)
    objective = make_objective(train, temperature=2.0, target="candidates")
    student = quantized(lut_size=4)
    batches = TailBatches(train, hidden_before(student, train.sequences(8)[0], 1).numpy())
    scale = decoder_blocks(student)[1].mlp.down_proj.scale.g.requires_grad_(True)
    loss = replace(layer_loss(objective), global_weight=0.0)
    loss(student, batches.batch(ROWS)).total.backward()
    assert scale.grad is not None and float(scale.grad.abs().sum()) > 0


def test_block_loss_is_the_mean_over_real_tokens() -> None:
    teacher, student = tiny_model(), quantized(lut_size=4)
    inputs = torch.randn(4, 6, 32).numpy()
    with torch.no_grad():
        full = part(teacher, 0, 1, norm=False)(inputs_embeds=torch.from_numpy(inputs))
        targets = full.last_hidden_state
        mine = part(student, 0, 1, norm=False)(inputs_embeds=torch.from_numpy(inputs))
    lengths = torch.tensor([6, 2, 5, 6])
    batches = BlockBatches(inputs, targets.numpy(), lengths)
    rows = np.array([3, 1])
    sums = BlockLoss()(part(student, 0, 1, norm=False), batches.batch(rows))
    slow = 0.0
    for row in rows:
        for place in range(int(lengths[row])):
            error = mine.last_hidden_state[row, place] - targets[row, place]
            slow += float(error.square().mean())
    assert int(sums.count) == 8
    assert float(sums.total) == pytest.approx(slow, rel=1e-5) and sums.held == sums.total
