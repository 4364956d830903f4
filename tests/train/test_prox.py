"""Training with the proximal regularizer: what runs, what is pulled, what is judged and kept."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError, ParamsError
from lib.model.grid import LayerGrid, fits
from lib.model.linear import LutLinear
from lib.model.surgery import is_mlp, quantized_layers
from lib.objective.distillation import make_objective
from lib.objective.loss import held_out_loss
from lib.params.prox import Prox
from lib.params.training import Rates, TrainConfig
from lib.quant.spec import ScaleForm
from lib.train.log import result_of
from lib.train.loop import Trainer
from lib.train.prox import ProxPenalty, penalty_of
from tests.tiny_models import CPU, logits_of, quantized, readers, same, state_of
from tests.train import samples
from tests.train.killing import KilledError, killer
from tests.train.samples import quiet

WEIGHTS = Rates(weight=3e-4)
STILL = Rates(weight=1e-30)  # the optimizer moves nothing
NAME = "model.layers.1.mlp.up_proj"


def config(**changes: Any) -> TrainConfig:
    return samples.config(**{"rates": WEIGHTS, **changes})


def make(
    model: PreTrainedModel, cache: Path, scratch: Path, params: TrainConfig, **prox: Any
) -> Trainer:
    train, val = readers(cache)
    objective = make_objective(train, temperature=2.0, target="candidates")
    penalty = penalty_of("prox", Prox(**prox))
    return Trainer(model, params, objective, train, val, CPU, scratch, penalty=penalty)


def start(**changes: Any) -> PreTrainedModel:
    return quantized(**{"lut_size": 4, **changes})


def penalty_in(trainer: Trainer) -> ProxPenalty:
    assert isinstance(trainer.penalty, ProxPenalty)
    return trainer.penalty


def with_masters(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose quantized weights are its masters, written out."""
    for name, layer in quantized_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.load_state_dict(
            {k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")}
        )
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def test_masters_compute_while_it_trains_under_their_own_names(cache: Path, tmp_path: Path) -> None:
    model = start()
    names = {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    hard = logits_of(model)
    trainer = make(model, cache, tmp_path, config())
    soft = logits_of(model)
    assert torch.equal(soft, logits_of(with_masters(start())))
    assert not torch.allclose(soft, hard, atol=1e-3)
    assert {t.name for t in trainer.trainables} == names
    inside = {name for name, p in model.named_parameters() if p.requires_grad}
    assert inside == names
    trainer.run(quiet)
    assert len(quantized_layers(model)) == 14 and not model.training


def test_it_is_judged_on_the_grid_and_left_as_it_was(cache: Path, tmp_path: Path) -> None:
    plain = samples.trainer(start(), cache, tmp_path / "plain", config())
    model = start()
    trainer = make(model, cache, tmp_path / "prox", config(), hard="selective", atol=0.2)
    before = state_of(model)
    row = trainer._evaluate()
    assert row["val_kd_loss"] == plain.held_out_loss()  # bit for bit
    floats = held_out_loss(with_masters(start()), trainer.loss, trainer.val_data, 16, CPU)
    assert row["val_soft_kd_loss"] == floats
    assert len({row[f"val_{kind}kd_loss"] for kind in ("", "soft_", "selective_")}) == 3
    assert same(state_of(model), before)
    fit, _ = fits({n: LayerGrid(x) for n, x in quantized_layers(start()).items()}, 0.2)
    assert row["hit_rate"] == fit.hit_rate and row["sat_rate"] == fit.sat_rate
    assert row["prox_distance"] == fit.distance and row["prox_coefficient"] == 0.0


def test_a_hard_loss_that_fails_leaves_the_masters(cache: Path, tmp_path: Path) -> None:
    model = start()
    penalty = penalty_in(make(model, cache, tmp_path, config()))
    before, calls = state_of(model), []

    def held_out() -> float:
        calls.append(same(state_of(model), before))
        if len(calls) == 2:
            raise NonFiniteError("on the grid")
        return 1.0

    with pytest.raises(NonFiniteError):
        penalty.measure(held_out, "val_kd_loss")
    assert calls == [True, False] and same(state_of(model), before)


@pytest.mark.parametrize("course", ["linear", "cosine", "exponential"])
def test_the_distance_shrinks_as_the_coefficients_say(
    cache: Path, tmp_path: Path, course: Any
) -> None:
    ends: dict[str, Any] = {"gamma_start": 0.1, "gamma_end": 0.4, "schedule": course}
    params = config(rates=STILL, steps=4, eval_every=1, warmup_steps=2)
    rows = make(start(), cache, tmp_path, params, **ends).run(quiet).progress.rows
    for step in range(1, 5):
        before, after = rows[step - 1], rows[step]
        strength = float(before["prox_coefficient"] or 0) * float(after["rate_factor"] or 0)
        wanted = float(before["prox_distance"] or 0) / (1 + strength) ** 2
        assert after["prox_distance"] == pytest.approx(wanted, rel=1e-4)
    assert rows[0]["prox_coefficient"] == pytest.approx(0.1)
    assert rows[3]["prox_coefficient"] == pytest.approx(0.4)  # of the last step
    assert rows[4]["hit_rate"] > rows[0]["hit_rate"]  # type: ignore[operator]
    off = make(start(), cache, tmp_path / "off", params, gamma_end=0.0).run(quiet).progress.rows
    assert off[4]["prox_distance"] == off[0]["prox_distance"]


def test_training_towards_the_grid_makes_it_fit(cache: Path, tmp_path: Path) -> None:
    """Against the same floats that are not pulled: on the grid they are better."""
    ends = []
    for gamma in (0.3, 0.0):
        params = config(steps=40, eval_every=10, eval_sequences=16)
        trainer = make(start(), cache, tmp_path / str(gamma), params, gamma_end=gamma)
        ends.append(trainer.run(quiet).progress)
    pulled, free = ends
    gaps = [abs(float(p.rows[-1]["val_soft_kd_loss"] or 0) - p.last_loss) for p in ends]
    assert gaps[0] < 0.2 * gaps[1]  # the model on the grid is nearly the one that trained
    assert pulled.last_loss < free.last_loss
    assert pulled.best_loss < pulled.initial_loss
    assert pulled.rows[-1]["hit_rate"] > 0.5  # type: ignore[operator]


def test_a_dual_run_reaches_its_distance(cache: Path, tmp_path: Path) -> None:
    params = config(steps=80, eval_every=40)
    gains = {"control": "dual", "beta": 0.01, "k_i": 0.01, "k_p": 0.1}
    result = make(start(), cache, tmp_path, params, **gains).run(quiet)
    last = result.progress.rows[-1]
    assert last["prox_distance"] == pytest.approx(0.01, rel=0.2)
    assert 0 < float(last["prox_coefficient"] or 0) < 1.0
    metrics = result_of(result.progress)
    assert metrics["prox_coefficient"] == last["prox_coefficient"]
    assert metrics["final_soft_kd"] == last["val_soft_kd_loss"]
    assert metrics["initial_soft_kd"] == result.progress.rows[0]["val_soft_kd_loss"]


def test_fisher_scores_share_the_pull_out(cache: Path, tmp_path: Path) -> None:
    """Moving averages of mean squared gradients, written out."""
    params = config(rates=STILL, clip=1e-3)  # scores are those of the gradients before clipping
    trainer = make(start(), cache, tmp_path, params, fisher=True, gamma_start=0.5, gamma_end=0.5)
    penalty = penalty_in(trainer)
    averages = dict.fromkeys(penalty.layers, 0.0)
    pulled: dict[str, float] = {}
    kept = penalty.after_backward

    def watched() -> None:
        for name, grid in penalty.grids.items():
            gradient = grid.weight.grad
            assert gradient is not None
            now = float(gradient.double().square().mean())
            averages[name] = 0.95 * averages[name] + 0.05 * now
            pulled[name] = float(grid.sums(0.05)[0])
        kept()

    penalty.after_backward = watched  # type: ignore[method-assign]
    for _ in range(3):
        trainer.train_step()
        mean = sum(averages.values()) / len(averages)
        for name, grid in penalty.grids.items():
            strength = 0.5 * averages[name] / mean
            wanted = pulled[name] / (1 + strength) ** 2
            assert float(grid.sums(0.05)[0]) == pytest.approx(wanted, rel=1e-3), name
    assert max(averages.values()) > 2 * min(averages.values())


def test_overflowing_gradients_do_not_count(cache: Path, tmp_path: Path) -> None:
    penalty = penalty_in(make(start(), cache, tmp_path, config(), fisher=True))
    for value in (1.0, math.inf):
        for grid in penalty.grids.values():
            grid.weight.grad = torch.full_like(grid.weight, value)
        penalty.after_backward()
    assert penalty.fisher.tolist() == pytest.approx([0.05] * 14)


@pytest.mark.parametrize("select", ["mlp", "attention", "all_linear"])
def test_selected_layers_are_floats_and_the_others_quantized(
    cache: Path, tmp_path: Path, select: Any
) -> None:
    model = start()
    trainer = make(model, cache, tmp_path, config(), select=select, gamma_end=0.5)
    layers = dict.fromkeys(t.name.removesuffix(".weight") for t in trainer.trainables)
    assert len(layers) == 14
    wanted = {"mlp": {True}, "attention": {False}, "all_linear": {True, False}}[select]
    for name in layers:
        assert isinstance(model.get_submodule(name), LutLinear) == (is_mlp(name) not in wanted)
    before = {t.name: t.parameter.detach().clone() for t in trainer.trainables}
    for _ in range(2):
        trainer.train_step()
    moved = [not torch.equal(before[t.name], t.parameter) for t in trainer.trainables]
    assert all(moved)  # what is not selected trains through its estimator
    trainer.run(quiet)
    assert all(
        torch.equal(x.indices, x.nearest_indices()) for x in quantized_layers(model).values()
    )


def test_what_does_not_train_is_not_pulled(cache: Path, tmp_path: Path) -> None:
    model = start()
    before = state_of(model)
    make(model, cache, tmp_path, config(train_mlp_only=True), gamma_end=0.5).run(quiet)
    after = state_of(model)
    for name in quantized_layers(model):
        key = f"{name}.weight"
        assert torch.equal(before[key], after[key]) == (not is_mlp(name))
    with pytest.raises(ParamsError, match="prox.select = attention: no such layer trains"):
        make(start(), cache, tmp_path, config(train_mlp_only=True), select="attention")


@pytest.mark.parametrize("hard", ["full", "selective"])
def test_the_result_is_an_ordinary_model_and_its_best(
    cache: Path, tmp_path: Path, hard: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = start(scale=ScaleForm.LOWRANK)
    trainer = make(model, cache, tmp_path, config(steps=12), hard=hard, gamma_end=0.4, atol=0.1)
    progress = trainer.run(quiet).progress
    layers = quantized_layers(model)
    assert all(torch.equal(x.indices, x.nearest_indices()) for x in layers.values())
    assert samples.trainer(model, cache, tmp_path, config()).held_out_loss() == progress.best_loss
    exact = total = near = 0
    for layer in layers.values():
        grid = LayerGrid(layer)
        exact += int((grid.weight == layer.dequantized()).sum())
        near += int(grid.sums(0.1)[1])
        total += grid.weight.numel()
    assert exact < total  # those far away are floats still
    assert (exact == near) == (hard == "selective")
    lines = [line for line in capsys.readouterr().err.splitlines() if "held-out loss" in line]
    assert [line.split()[0] for line in lines] == ["initial", "final"]
    assert f"{progress.initial_loss:.4f} on the grid" in lines[0]
    assert f"{progress.last_loss:.4f} on the grid" in lines[1]
    assert ("val_selective_kd_loss" in progress.rows[0]) == (hard == "selective")


RUNS: list[dict[str, Any]] = [
    {"control": "dual", "beta": 0.02, "k_i": 0.05, "k_p": 0.2, "fisher": True},
    {"schedule": "exponential", "gamma_start": 0.01, "gamma_end": 0.3, "hard": "selective"},
    {"select": "mlp", "schedule": "cosine", "gamma_end": 0.3, "fisher": True},
]


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("prox", RUNS, ids=str)
def test_killed_and_resumed_equals_never_stopped(
    cache: Path, tmp_path: Path, prox: dict[str, Any], ema: float
) -> None:
    params = config(ema=ema, warmup_steps=3, schedule="cosine", weight_decay=0.1)
    whole_model = start()
    whole_trainer = make(whole_model, cache, tmp_path / "whole", params, **prox)
    whole = whole_trainer.run(quiet)

    for step in (3, 5):
        with pytest.raises(KilledError):
            make(start(), cache, tmp_path / "parts", params, **prox).run(killer(step))
        random.seed(step)
        np.random.seed(step)
        torch.manual_seed(step)
    model, steps = start(), []
    resumed = make(model, cache, tmp_path / "parts", params, **prox)
    result = resumed.run(lambda progress: steps.append(progress.step))
    assert steps == [5, 6]
    assert result.progress == whole.progress and same(state_of(model), state_of(whole_model))
    assert same(penalty_in(resumed).state(), penalty_in(whole_trainer).state())


def test_a_resumed_run_needs_the_saved_coefficient(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above."""
    prox = RUNS[0]
    whole = make(start(), cache, tmp_path / "whole", config(), **prox).run(quiet)

    with pytest.raises(KilledError):
        make(start(), cache, tmp_path / "parts", config(), **prox).run(killer(5))
    monkeypatch.setattr(ProxPenalty, "load", lambda _self, _state: None)
    parts = make(start(), cache, tmp_path / "parts", config(), **prox).run(quiet)
    assert parts.progress != whole.progress


def test_a_non_finite_float_layer_is_named(cache: Path, tmp_path: Path) -> None:
    model = start()
    trainer = make(model, cache, tmp_path, config())

    def spoil(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * math.nan

    model.get_submodule(NAME).register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step 1: .*output of {NAME}$"):
        trainer.train_step()


def test_bf16_and_checkpointing_train_too(cache: Path, tmp_path: Path) -> None:
    params = config(dtype="bf16", gradient_checkpointing=True, steps=10, eval_every=5)
    model = start()
    progress = make(model, cache, tmp_path, params, gamma_end=0.3).run(quiet).progress
    assert float(progress.rows[-1]["prox_distance"] or 0) < float(
        progress.rows[0]["prox_distance"] or 0
    )
    assert all(p.dtype == torch.float32 for p in model.parameters())
