"""The held-out mean of any loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib.objective.loss import LossSums, held_out_loss
from tests.tiny_models import CPU


class Rows:
    """Held-out rows that are their own numbers."""

    def __len__(self) -> int:
        return 3

    def batch(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).float() + 1


class Mean:
    """The mean of what the model makes of the rows."""

    name = "mean"

    def measured(self) -> Mean:
        return self

    def __call__(self, model: nn.Module, batch: Tensor) -> LossSums:
        values = model(batch)
        return LossSums(values.sum(), values.sum(), torch.tensor(len(values)))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_spares_held_out_text_and_is_on_again_afterwards(training: bool) -> None:
    model: Any = nn.Dropout(0.5).train(training)
    assert held_out_loss(model, Mean(), Rows(), 3, CPU) == 2.0
    assert model.training == training
