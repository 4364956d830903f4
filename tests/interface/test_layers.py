"""Layers trained from Python, with the reference implementation's arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lib.api import train_all_layers, train_layer
from lib.base.errors import MismatchError, ParamsError
from lib.interface.support import info_of, set_info
from lib.model.blocks import block_prefix
from lib.snap.snap import snap_model
from tests.tiny_models import make_caches, quantized, state_of, tiny_model

SETTINGS = {
    "device": "cpu",
    "batch_size": 8,
    "lr": 1e-3,
    "max_steps": 6,
    "grad_accum": 1,
    "temperature": 2.0,
    "train_weights": False,
    "train_scales": True,
    "local_weight": 0.5,
    "global_weight": 0.5,
    "hard_top1_weight": 0.1,
    "hard_full_weight": 0.01,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_caches(tmp_path_factory.mktemp("cache"), rows=32, teacher="its mark")


@pytest.fixture
def model() -> PreTrainedModel:
    made = quantized(lut_size=4)
    set_info(made, {"teacher": "its mark"})
    return made


def changed_blocks(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> set[int]:
    names = [
        name for name, value in state_of(model).items() if not torch.equal(value, before[name])
    ]
    return {b for b in (0, 1) for name in names if name.startswith(block_prefix(model, b))}


def test_one_layer(model: PreTrainedModel, cache: Path) -> None:
    before = state_of(model)
    result = train_layer(model, 1, cache, **SETTINGS)
    assert changed_blocks(model, before) == {1}
    assert result["final_kd"] < result["initial_kd"] and result["steps"] == 6
    assert info_of(model)["stage"] == "train_layer"


@pytest.mark.parametrize("teacher", [None, tiny_model()])
def test_all_layers(model: PreTrainedModel, cache: Path, teacher: PreTrainedModel | None) -> None:
    before = state_of(model)
    settings = {**SETTINGS, "train_weights": True, "lr": 3e-4}
    result = train_all_layers(model, cache, teacher=teacher, **settings)
    assert changed_blocks(model, before) == {0, 1}
    assert result["final_kd"] < result["initial_kd"] and result["steps"] == 12


def test_wrong_arguments_are_named(model: PreTrainedModel, cache: Path) -> None:
    with pytest.raises(ParamsError, match="layer_idx 2: the model has layers 0 to 1"):
        train_layer(model, 2, cache)
    with pytest.raises(ParamsError, match="max_step is not a known key; there are device"):
        train_all_layers(model, cache, max_step=3)
    with pytest.raises(ParamsError, match="all 0"):
        train_all_layers(model, cache, train_scales=False)
    set_info(model, {"teacher": "another"})
    with pytest.raises(MismatchError, match="another"):
        train_all_layers(model, cache)
    snap_model(model, baked=False)
    with pytest.raises(MismatchError, match="no master weights"):
        train_all_layers(model, cache)
