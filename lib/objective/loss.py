"""What the training loop asks of a loss, and the held-out mean of any such loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.workers import rank, total, world_size


@dataclass(frozen=True)
class LossSums:
    """Sums over the positions that count; divide by ``count`` for means."""

    total: Tensor
    """What is trained on."""
    held: Tensor
    """The term that held-out text is judged by, without gradient."""
    count: Tensor


class Batch(Protocol):
    """Some sequences: B rows, P positions."""

    @property
    def mask(self) -> Tensor:
        """bool ``[B, P]``: the position counts."""

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""


class Batches(Protocol):
    """Random access to training or held-out sequences."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray) -> Any:
        """These rows, in this order, as a :class:`Batch` on the CPU."""


class Loss(Protocol):
    """A loss of a model on a batch."""

    @property
    def name(self) -> str:
        """Of the term that held-out text is judged by: ``kd``, say, for the column kd_loss."""

    def __call__(self, model: Any, batch: Any) -> LossSums:
        """Loss sums of one batch."""

    def measured(self) -> Loss:
        """What held-out text is judged by: the same without other terms, or another loss on other
        batches."""


class LossModule(nn.Module):
    """A model and its loss as one module: what data parallelism wraps."""

    def __init__(self, model: PreTrainedModel, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> LossSums:
        """Loss sums of one batch."""
        return self.loss(self.model, batch)


EVAL_BATCH = 8  # sequences; one quantization of the model serves a whole forward pass


@torch.no_grad()
def held_out_loss(
    model: nn.Module, loss: Loss, held_out: Batches, sequences: int, device: torch.device
) -> float:
    """Mean of the held-out term over the first ``sequences`` sequences (all, if there are fewer).

    Several processes share the sequences, and all get the mean.
    """
    training = model.training  # dropout is not for held-out text
    model.eval()
    measure = loss.measured()
    count = min(sequences, len(held_out))
    held, positions = 0.0, 0
    together = EVAL_BATCH * world_size()
    for start in range(0, count, together):
        rows = np.arange(start, min(start + together, count))
        mine = rows[rank() :: world_size()]
        # a model in shards needs every process in every forward pass, work or not
        sums = measure(model, held_out.batch(mine if len(mine) else rows[:1]).to(device))
        if len(mine):
            held += float(sums.held)
            positions += int(sums.count)
    model.train(training)
    if world_size() > 1:
        both = torch.tensor([held, positions], dtype=torch.float64, device=device)
        both = total(both)
        held, positions = float(both[0]), int(both[1])
    return held / max(positions, 1)
