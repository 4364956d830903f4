"""Training on text itself: with the teacher in memory instead of its cache, or on labels alone.

Held-out text is judged as everywhere, by the cached KD term: runs stay comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.distill.head import full_distillation, label_losses
from lib.objective.distillation import Objective, PositionLoss
from lib.objective.loss import LossSums
from lib.text.sequences import TokenSet


@dataclass(frozen=True)
class TextBatch:
    """Token rows: input ids long ``[B, L]``, right-padded, and which positions count."""

    input_ids: Tensor
    mask: Tensor
    """bool ``[B, L - 1]``: what the position predicts is to be learned."""

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on another device."""
        return TextBatch(self.input_ids.to(device), self.mask.to(device))


class TextBatches:
    """Random access to token rows; every real token is learned."""

    def __init__(self, tokens: TokenSet) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: np.ndarray) -> TextBatch:
        """These rows, in this order."""
        ids = torch.from_numpy(self.tokens.input_ids[rows]).long()
        return TextBatch(ids, self._learned(rows))

    def _learned(self, rows: np.ndarray) -> Tensor:
        targets = torch.arange(1, self.tokens.input_ids.shape[1])
        return targets < torch.from_numpy(self.tokens.lengths[rows])[:, None]


class AnswerBatches(TextBatches):
    """The same rows, of which prompts are read but not learned."""

    def _learned(self, rows: np.ndarray) -> Tensor:
        return super()._learned(rows) & ~torch.from_numpy(self.tokens.prompt[rows][:, 1:])


def _hidden(model: PreTrainedModel, batch: TextBatch) -> Tensor:
    """The last hidden states of all predicting positions, ``[P, D]``.

    No attention mask is needed: padding is on the right, so no real position sees it.
    """
    states = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class LiveObjective:
    """``total = w KD + (1 - w) CE(labels) + hf CE(top-1)``, all over the whole vocabulary.

    Attributes:
        teacher: frozen, on the device that trains; same vocabulary as the student.
        held_out: the cached objective, whose KD term held-out text is judged by.
        temperature: T of the KD term, which is scaled by T^2.
        distill_weight: w; hard_full_weight: hf.
    """

    name: ClassVar[str] = "kd"
    teacher: PreTrainedModel
    held_out: Objective
    temperature: float
    distill_weight: float
    hard_full_weight: float

    def measured(self) -> Objective:
        """The cached KD term."""
        return self.held_out.measured()

    def __call__(self, model: PreTrainedModel, batch: TextBatch) -> LossSums:
        """Loss sums of one batch; the teacher runs too."""
        with torch.no_grad():
            wanted = _hidden(self.teacher, batch)
        heads = (m.get_output_embeddings().weight.detach() for m in (model, self.teacher))
        head, teacher_head = heads
        labels = batch.input_ids[:, 1:].flatten()
        losses = full_distillation(
            _hidden(model, batch), head, wanted, teacher_head, labels, self.temperature
        )
        return PositionLoss.over_vocabulary(
            losses,
            batch.mask,
            distill_weight=self.distill_weight,
            hard_full_weight=self.hard_full_weight,
        ).sums()


@dataclass(frozen=True, kw_only=True)
class TextObjective:
    """Cross entropy on the labels alone; ``held_out`` as in :class:`LiveObjective`."""

    name: ClassVar[str] = "kd"
    held_out: Objective

    def measured(self) -> Objective:
        """The cached KD term."""
        return self.held_out.measured()

    def __call__(self, model: PreTrainedModel, batch: TextBatch) -> LossSums:
        """Loss sums of one batch. Its column of the log, kd_loss, holds the cross entropy."""
        head = model.get_output_embeddings().weight.detach()
        losses = label_losses(_hidden(model, batch), head, batch.input_ids[:, 1:].flatten())
        none = torch.zeros_like(losses)
        return PositionLoss(kd=losses, soft=losses, hard=none, mask=batch.mask.flatten()).sums()
