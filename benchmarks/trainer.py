"""The project's trainer on one batch in memory: a step is all of a training step but the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from lib.cache.shards import CachedBatch, CacheReader
from lib.objective.distillation import Objective
from lib.params.training import TrainConfig
from lib.train.loop import Trainer


class _OneBatch:
    """Stands in for a cache: every batch is the same."""

    def __init__(self, batch: CachedBatch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch.input_ids)

    def batch(self, _rows: np.ndarray) -> CachedBatch:
        return self._batch


def trainer_on(
    model: PreTrainedModel,
    batch: CachedBatch,
    rates: dict[str, float],
    device: torch.device,
    scratch: Path,
    **options: Any,
) -> Trainer:
    """A trainer whose every step sees ``batch``; ``options`` as in params.yaml."""
    every = {"weight": 0.0, "scale_direction": 0.0, "scale_magnitude": 0.0, "lut": 0.0}
    params = TrainConfig(batch_size=len(batch.input_ids), rates={**every, **rates}, **options)
    objective = Objective(
        temperature=2.0,
        tail=False,
        temperature_index=0,
        distill_weight=1.0,
        hard_top1_weight=0.0,
        hard_full_weight=0.0,
    )
    cache = cast(CacheReader, _OneBatch(batch))
    return Trainer(model, params, objective, cache, cache, device, scratch)
