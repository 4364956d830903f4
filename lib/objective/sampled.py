"""The distillation objective on sampled teacher targets: the whole vocabulary, from a few ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from lib.cache.sampled import SampledBatch
from lib.distill.head import sampled_distillation
from lib.objective.distillation import Objective, PositionLoss
from lib.objective.loss import LossSums


@dataclass(frozen=True, kw_only=True)
class SampledObjective:
    """``total = w KD + (1 - w) CE(labels) + hf CE(top-1)``, all over the whole vocabulary; KD and
    its gradient in the mean over what was drawn (docs/math.md).

    Attributes:
        held_out: the objective on held-out text, whose KD term it is judged by.
        temperature: T of the KD term, at which the targets were drawn.
        distill_weight: w; hard_full_weight: hf.
    """

    name: ClassVar[str] = "kd"
    held_out: Objective
    temperature: float
    distill_weight: float
    hard_full_weight: float

    def measured(self) -> Objective:
        """The KD term on the top k of held-out text."""
        return self.held_out.measured()

    def __call__(self, model: PreTrainedModel, batch: SampledBatch) -> LossSums:
        """Loss sums of one batch.

        No attention mask is needed: padding is on the right, so no real position sees it.
        """
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return self.of_hidden(model, hidden, batch).sums()

    def of_hidden(
        self, model: PreTrainedModel, hidden: Tensor, batch: SampledBatch
    ) -> PositionLoss:
        """Losses of each position, given the decoder's last hidden states ``[B, L, D]``."""
        losses = sampled_distillation(
            hidden[:, :-1].flatten(0, 1),
            model.get_output_embeddings().weight.detach(),
            batch.sample_ids.flatten(0, 1),
            batch.logprobs.flatten(0, 1),
            batch.weights.flatten(0, 1),
            batch.input_ids[:, 1:].flatten(),
            batch.top1_ids.flatten(),
            self.temperature,
        )
        return PositionLoss.over_vocabulary(
            losses,
            batch.mask,
            distill_weight=self.distill_weight,
            hard_full_weight=self.hard_full_weight,
        )
