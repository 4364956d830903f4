"""What distillation starts from: the teacher, quantized."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from lib.cache.shards import CacheReader
from lib.model.calibrate import quantize_calibrated
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.quant.spec import ModelSpec


def quantized_teacher(folder: Path, cache: Path, spec: ModelSpec) -> tuple[PreTrainedModel, str]:
    """The teacher, quantized and untrained, and its fingerprint; refits are weighted by
    activations on the first ``spec.calibration_sequences`` training sequences.

    Raises:
        MismatchError: sequences are needed, and the cache is another teacher's.
    """
    model = load_causal_lm(folder)
    mark = folder_fingerprint(folder)

    def sequences(count: int) -> tuple[Tensor, Tensor]:
        return CacheReader(cache / "train", {"teacher": mark}).sequences(count)

    quantize_calibrated(model, spec, sequences)
    return model, mark
