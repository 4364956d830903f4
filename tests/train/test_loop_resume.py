"""A run that is killed and resumed is the run that never stopped, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError
from lib.model.surgery import quantized_layers
from lib.params.training import Rates, TrainConfig
from lib.quant.spec import Codebook, ScaleForm
from lib.train.state import Progress
from tests.tiny_models import CPU, quantized, same, state_of
from tests.train.killing import KilledError, killer
from tests.train.samples import BOTH, config, quiet, trainer

RUNS: list[dict[str, Any]] = [
    {"ema": 0.8, "grad_accum": 2, "batch_size": 3, "warmup_steps": 3, "schedule": "cosine"},
    {"rates": Rates(scale_direction=1e-3, scale_magnitude=1e-3), "batch_size": 5},
    {"rates": Rates(weight=3e-4), "hard_top1_weight": 0.1, "hard_full_weight": 5e-4},
    {"rates": BOTH.model_copy(update={"lut": 1e-3}), "dtype": "bf16", "weight_decay": 0.1},
]


def model_for(params: TrainConfig) -> PreTrainedModel:
    learned = params.rates.lut > 0
    return quantized(lut_size=4, codebook=Codebook.LEARNED if learned else Codebook.UNIFORM)


@pytest.mark.parametrize("changes", RUNS, ids=str)
@pytest.mark.parametrize("kills", [[4], [1, 3, 5]])
def test_killed_and_resumed_equals_never_stopped(
    cache: Path, tmp_path: Path, changes: dict[str, Any], kills: list[int]
) -> None:
    """States are saved after steps 2 and 4 of 6: kills fall on, after and before one."""
    params = config(steps=6, checkpoint_every=2, eval_every=3, **changes)
    whole_model = model_for(params)
    whole = trainer(whole_model, cache, tmp_path / "whole", params).run(quiet)

    for step in kills:
        with pytest.raises(KilledError):
            trainer(model_for(params), cache, tmp_path / "parts", params).run(killer(step))
        random.seed(step)  # another process starts elsewhere
        np.random.seed(step)
        torch.manual_seed(step)
    model = model_for(params)
    steps: list[int] = []
    resumed = trainer(model, cache, tmp_path / "parts", params)
    result = resumed.run(lambda progress: steps.append(progress.step))

    assert steps == [5, 6]  # it did go on where it was
    assert result.progress == whole.progress
    assert same(result.plain, whole.plain) and bool(whole.plain) is (params.ema > 0)
    assert [list(row) for row in result.progress.rows] == [list(r) for r in whole.progress.rows]
    assert same(state_of(model), state_of(whole_model))


def test_the_optimizer_and_the_averages_resume_too(cache: Path, tmp_path: Path) -> None:
    params = config(steps=6, checkpoint_every=4, ema=0.9)
    whole = trainer(quantized(), cache, tmp_path / "whole", params)
    whole.run(quiet)
    with pytest.raises(KilledError):
        trainer(quantized(), cache, tmp_path / "parts", params).run(killer(5))
    parts = trainer(quantized(), cache, tmp_path / "parts", params)
    parts.run(quiet)
    assert same(whole.kept.average, parts.kept.average)
    for one, other in zip(whole.trainables, parts.trainables, strict=True):
        states = [t.optimizer.state[i.parameter] for t, i in ((whole, one), (parts, other))]
        assert states[0]["step"] == 6 and same(*states)


def poison(model: PreTrainedModel, name: str) -> None:
    """Make the forward pass of one layer give NaN from now on."""
    model.get_submodule(name).register_forward_hook(lambda _m, _x, y: y * float("nan"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_non_finite_loss_stops_and_leaves_the_saved_state(
    cache: Path, tmp_path: Path, dtype: str
) -> None:
    params = config(steps=8, checkpoint_every=2, eval_every=8, dtype=dtype)
    name = "model.layers.1.self_attn.v_proj"
    model = quantized()

    def report(progress: Progress) -> None:
        if progress.step == 5:
            poison(model, name)

    with pytest.raises(NonFiniteError) as caught:
        trainer(model, cache, tmp_path / "parts", params).run(report)
    assert str(caught.value) == f"loss is nan at step 6: first in the output of {name}"

    whole_model, again = quantized(), quantized()  # without the poison the run goes on
    whole = trainer(whole_model, cache, tmp_path / "whole", params).run(quiet)
    steps: list[int] = []
    made = trainer(again, cache, tmp_path / "parts", params)
    result = made.run(lambda progress: steps.append(progress.step))
    assert steps == [5, 6, 7, 8]
    assert result.progress == whole.progress and same(state_of(again), state_of(whole_model))


def test_a_non_finite_gradient_stops_before_the_step(cache: Path, tmp_path: Path) -> None:
    model = quantized()
    made = trainer(model, cache, tmp_path, config())
    before = {t.name: t.parameter.detach().clone() for t in made.trainables}
    bad = quantized_layers(model)["model.layers.0.mlp.down_proj"].scale.g

    def spoil(value: float) -> None:
        handle = bad.register_hook(lambda grad: torch.full_like(grad, value))
        with pytest.raises(NonFiniteError) as caught:
            made.train_step()
        handle.remove()
        made.optimizer.zero_grad()
        messages.append(str(caught.value))

    messages: list[str] = []
    spoil(float("inf"))
    spoil(3e38)  # finite; the norm is not
    assert messages == [
        "gradient of model.layers.0.mlp.down_proj.scale.g is not finite at step 1",
        "the norm of all gradients is not finite at step 1",
    ]
    after = {t.name: t.parameter.detach() for t in made.trainables}
    assert same(before, after)


def test_the_loss_scaler_skips_overflows_and_resumes(cache: Path, tmp_path: Path) -> None:
    """The scaler of CUDA's fp16, on the CPU: the first steps overflow and must not stop a run."""

    def run(scratch: Path, report: Any) -> tuple[Progress, dict[str, Tensor], dict[str, Any]]:
        model = quantized(scale=ScaleForm.LOWRANK)
        made = trainer(model, cache, scratch, config(steps=8, checkpoint_every=5, eval_every=8))
        made.scaler = torch.amp.GradScaler(CPU.type, init_scale=2.0**10, growth_interval=4)
        parameter = made.trainables[0].parameter
        parameter.register_hook(lambda g: g * float("inf") if made.progress.step < 2 else g)
        result = made.run(report)
        return result.progress, state_of(model), made.scaler.state_dict()

    whole = run(tmp_path / "whole", quiet)
    norms = [row["gradient_norm"] for row in whole[0].rows[1:]]
    assert [norm is None for norm in norms] == [True] * 2 + [False] * 6
    assert whole[2]["scale"] == 2.0**9  # halved twice, doubled after four good steps
    with pytest.raises(KilledError):
        run(tmp_path / "parts", killer(6))
    parts = run(tmp_path / "parts", quiet)
    assert parts[0] == whole[0] and parts[2] == whole[2]
    assert same(parts[1], whole[1])
