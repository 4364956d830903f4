"""The quantized model before any training: what stage scales starts from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.calibrate import quantize_calibrated
from lib.model.load import load_causal_lm
from lib.quant.spec import ModelSpec
from lib.text.sequences import TokenSet


def load_untrained(teacher: Path, train: Path, spec: ModelSpec) -> PreTrainedModel:
    """The teacher, quantized; calibrated on the first training sequences if the spec asks for it.

    Args:
        train: the training split of the tokens.
    """
    model = load_causal_lm(teacher)

    def sequences(count: int) -> tuple[Tensor, Tensor]:
        tokens = TokenSet(train)
        ids = torch.tensor(tokens.input_ids[:count], dtype=torch.int64)
        return ids, torch.tensor(tokens.lengths[:count])

    quantize_calibrated(model, spec, sequences)
    return model
