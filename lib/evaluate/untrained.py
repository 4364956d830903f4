"""The quantized model before any training: what stage scales starts from."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from lib.model.calibrate import input_importance
from lib.model.load import load_causal_lm
from lib.model.surgery import quantize_model
from lib.quant.spec import ModelSpec
from lib.text.sequences import TokenSet


def load_untrained(teacher: Path, train: Path, spec: ModelSpec) -> PreTrainedModel:
    """The teacher, quantized; calibrated on the first training sequences if the spec asks for it.

    Args:
        train: the training split of the tokens.
    """
    model = load_causal_lm(teacher)
    importance = None
    if count := spec.calibration_sequences:
        tokens = TokenSet(train)
        ids = torch.tensor(tokens.input_ids[:count], dtype=torch.int64)
        importance = input_importance(model, ids, torch.tensor(tokens.lengths[:count]))
    quantize_model(model, spec, importance)
    return model
