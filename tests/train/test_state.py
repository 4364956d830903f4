"""The saved state brings everything back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from lib.train.roles import Trainable, select
from lib.train.state import Progress, load_state, rows_to_csv, save_state
from tests.tiny_models import quantized
from tests.train.samples import config


def parts() -> tuple[list[Trainable], torch.optim.AdamW]:
    trainables = select(quantized(), config())
    return trainables, torch.optim.AdamW([t.parameter for t in trainables], lr=0.01)


def step(trainables: list[Trainable], optimizer: torch.optim.AdamW) -> None:
    for item in trainables:
        item.parameter.grad = torch.empty_like(item.parameter).copy_(
            torch.randn(item.parameter.shape)
        )
    optimizer.step()


def test_round_trip_of_tensors_optimizer_progress_and_generators(tmp_path: Path) -> None:
    trainables, optimizer = parts()
    torch.manual_seed(1)
    step(trainables, optimizer)
    step(trainables, optimizer)
    progress = Progress(
        step=2,
        initial_loss=1 / 3,
        best_loss=0.1,
        best_step=1,
        last_loss=2e-300,
        rows=[{"step": 0, "val_kd_loss": 1 / 3}, {"step": 1, "loss": 0.7, "val_kd_loss": None}],
    )
    extra = {"best.x": torch.randn(3)}
    save_state(tmp_path / "state", trainables, optimizer, progress, extra)
    drawn = (torch.rand(3), np.random.rand(3), np.random.randn(), random.random())
    step(trainables, optimizer)

    again, fresh = parts()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    loaded = load_state(tmp_path / "state", again, fresh)
    assert loaded is not None
    assert loaded[0] == progress
    assert loaded[1].keys() == extra.keys() and torch.equal(loaded[1]["best.x"], extra["best.x"])
    redrawn = (torch.rand(3), np.random.rand(3), np.random.randn(), random.random())
    assert torch.equal(drawn[0], redrawn[0])
    assert (drawn[1] == redrawn[1]).all() and drawn[2:] == redrawn[2:]
    step(again, fresh)  # the generators go on as they did: the same gradients
    for one, other in zip(trainables, again, strict=True):
        assert torch.equal(one.parameter, other.parameter)


def test_a_transposed_parameter_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    """Fitted scales are column by column in memory, and the fused kernel goes by memory."""

    def transposed() -> tuple[list[Trainable], torch.optim.AdamW]:
        trainables = select(quantized(), config())
        for item in trainables:
            if item.parameter.dim() == 2:
                item.parameter.data = item.parameter.data.T.contiguous().T
        return trainables, torch.optim.AdamW([t.parameter for t in trainables], lr=0.01, fused=True)

    trainables, optimizer = transposed()
    torch.manual_seed(1)
    step(trainables, optimizer)
    save_state(tmp_path / "state", trainables, optimizer, Progress(best_loss=1.0), {})
    step(trainables, optimizer)
    again, fresh = transposed()
    assert load_state(tmp_path / "state", again, fresh) is not None
    step(again, fresh)
    for one, other in zip(trainables, again, strict=True):
        assert torch.equal(one.parameter, other.parameter), one.name


def test_nothing_or_half_a_state_is_no_state(tmp_path: Path) -> None:
    trainables, optimizer = parts()
    assert load_state(tmp_path / "state", trainables, optimizer) is None
    save_state(tmp_path / "state", trainables, optimizer, Progress(best_loss=1.0), {})
    (tmp_path / "state/state.json").unlink()
    assert load_state(tmp_path / "state", trainables, optimizer) is None


def test_a_newer_state_replaces_the_older(tmp_path: Path) -> None:
    trainables, optimizer = parts()
    for number in (1, 2):
        save_state(
            tmp_path / "state", trainables, optimizer, Progress(step=number, best_loss=1.0), {}
        )
    loaded = load_state(tmp_path / "state", trainables, optimizer)
    assert loaded is not None and loaded[0].step == 2
    assert [f.name for f in tmp_path.iterdir()] == ["state"]
    names = sorted(f.name for f in (tmp_path / "state").iterdir())
    assert names == ["state.json", "state.safetensors"]  # no pickle


def test_csv() -> None:
    rows: list[dict[str, float | int | None]] = [
        {"step": 0, "val_kd_loss": 1.5},
        {"step": 1, "loss": 1e-05, "kd_loss": 0.25, "rate_factor": 1.0, "gradient_norm": None},
    ]
    assert rows_to_csv(rows) == (
        "step,loss,kd_loss,val_kd_loss,rate_factor,gradient_norm\n0,,,1.5,,\n1,1e-05,0.25,,1.0,\n"
    )
