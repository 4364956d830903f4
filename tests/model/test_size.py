"""Bits counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lib.model.size import folder_megabytes, model_size
from lib.model.surgery import quantize_model
from lib.model.tiny import random_teacher
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm


def _spec(lut_size: int, rank: int, form: ScaleForm) -> LinearSpec:
    return LinearSpec(
        lut_size=lut_size, rank=rank, group_size=8, scale=form, codebook=Codebook.UNIFORM
    )


@pytest.mark.parametrize(
    ("form", "scales"),
    [
        (ScaleForm.LOWRANK, 3 * (32 + 24)),
        (ScaleForm.DIRECTIONAL, 3 * (32 + 24) + 3),
        (ScaleForm.GROUP, 4 * 24),  # 32 inputs in groups of 8
        (ScaleForm.CHANNEL, 24 + 1),
    ],
)
@pytest.mark.parametrize(("lut_size", "bits"), [(2, 1), (4, 2), (16, 4), (256, 8)])
def test_one_layer(form: ScaleForm, scales: int, lut_size: int, bits: int) -> None:
    model = nn.ModuleDict({"up_proj": nn.Linear(32, 24), "other": nn.Linear(5, 3, bias=False)})
    quantize_model(model, ModelSpec(mlp=_spec(lut_size, 3, form), attention=None))
    size = model_size(model)
    layer = 32 * 24 * bits + 16 * (scales + lut_size + 24)
    assert size.layer_bits == layer
    assert size.layer_weights == 32 * 24
    assert size.bits == layer + 16 * 15
    assert size.weights == 32 * 24 + 24 + 15
    assert size.bits_per_layer_weight == layer / (32 * 24)
    assert size.megabytes == (layer + 240) / 8e6


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_unquantized_model_takes_16_bits(kind: str) -> None:
    model, _ = random_teacher(kind, seed=0)
    size = model_size(model)
    assert size.bits_per_weight == 16
    assert size.bits_per_layer_weight is None
    assert size.weights == sum(p.numel() for p in model.parameters())  # tied: once


def test_folder_megabytes(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(1500))
    (tmp_path / "deep/b.bin").write_bytes(bytes(500))
    assert folder_megabytes(tmp_path) == 0.002
