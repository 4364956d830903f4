"""The untrained model is the one that training starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.evaluate.untrained import load_untrained
from lib.model.calibrate import input_moments
from lib.model.load import load_causal_lm
from lib.model.surgery import quantize_model, quantized_layers
from lib.model.tiny import VOCABULARY, random_teacher
from lib.quant.spec import ModelSpec, ScaleForm
from lib.text.sequences import TokenSet, write_tokens
from tests.tiny_models import linear_spec


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A teacher and a training split."""
    model, tokenizer = random_teacher("llama", seed=0)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    write_tokens(
        tmp_path / "train",
        np.random.default_rng(0).integers(3, 250, (6, 16)).astype(np.int32),
        np.full(6, 16, dtype=np.int32),
        split="train",
        vocab_size=VOCABULARY,
        pad_id=0,
        tokenizer="tiny",
    )
    return tmp_path / "teacher", tmp_path / "train"


def _spec(refits: int, calibration: int) -> ModelSpec:
    linear = linear_spec(lut_size=4, rank=2, scale=ScaleForm.LOWRANK, refit_steps=refits)
    return ModelSpec(mlp=linear, attention=linear, calibration_sequences=calibration)


@pytest.mark.parametrize(("refits", "calibration"), [(0, 0), (2, 4)])
def test_is_the_quantized_teacher(
    folders: tuple[Path, Path], refits: int, calibration: int
) -> None:
    teacher, train = folders
    spec = _spec(refits, calibration)
    expected = load_causal_lm(teacher)
    importance = None
    if calibration:
        tokens = TokenSet(train)
        rows = torch.from_numpy(np.array(tokens.input_ids[:calibration], dtype=np.int64))
        lengths = torch.from_numpy(np.array(tokens.lengths[:calibration]))
        importance = input_moments(expected, rows, lengths, full=False)
    quantize_model(expected, spec, importance)
    wanted = quantized_layers(expected)
    for name, layer in quantized_layers(load_untrained(teacher, train, spec)).items():
        assert torch.equal(layer.dequantized(), wanted[name].dequantized())


def test_calibration_text_matters(folders: tuple[Path, Path]) -> None:
    teacher, train = folders
    spec = _spec(2, 4)
    fewer = dataclasses.replace(spec, calibration_sequences=1)
    one, other = (quantized_layers(load_untrained(teacher, train, s)) for s in (spec, fewer))
    assert any(not torch.equal(one[n].dequantized(), other[n].dequantized()) for n in one)
