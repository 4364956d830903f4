"""The distillation objective of every training stage, from cached teacher targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import MismatchError
from lib.cache.shards import CachedBatch, CacheReader
from lib.cache.spec import CacheSpec
from lib.distill.head import FullDistillation, candidate_logits, full_vocabulary, shared_logits
from lib.distill.losses import cross_entropy, hard_top1, kd_candidates, kd_tail
from lib.objective.loss import LossSums


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Losses of each position ``[P]``: the KD term, what learns from distributions (KD and labels,
    weighted), the hard terms (weighted), and which positions count."""

    kd: Tensor
    soft: Tensor
    hard: Tensor
    mask: Tensor

    @classmethod
    def over_vocabulary(
        cls,
        losses: FullDistillation,
        mask: Tensor,
        *,
        distill_weight: float,
        hard_full_weight: float,
    ) -> Self:
        """``w KD + (1 - w) CE(labels)`` and ``hf CE(top-1)``; mask bool ``[B, P / B]``."""
        return cls(
            kd=losses.kd,
            soft=distill_weight * losses.kd + (1 - distill_weight) * losses.label,
            hard=hard_full_weight * losses.top1,
            mask=mask.flatten(),
        )

    def sums(self, soft_weight: float = 1.0) -> LossSums:
        """Sums over the positions that count; the soft part weighted."""
        zero = torch.zeros((), device=self.kd.device)
        total = soft_weight * self.soft + self.hard
        return LossSums(
            torch.where(self.mask, total, zero).sum(),
            torch.where(self.mask, self.kd, zero).sum().detach(),
            self.mask.sum(),
        )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``total = w KD + (1 - w) CE(labels) + h1 CE(top-1 | candidates) + hf CE(top-1)``.

    Attributes:
        temperature: T of the KD term.
        tail: KD over the candidates and one class for the rest, not over the candidates alone.
        temperature_index: column of the cache's scaled log-sum-exps that belongs to T (tail).
        distill_weight: w; hard_top1_weight: h1; hard_full_weight: hf.
    """

    name: ClassVar[str] = "kd"
    temperature: float
    tail: bool
    temperature_index: int
    distill_weight: float
    hard_top1_weight: float
    hard_full_weight: float

    @property
    def needs_full_vocabulary(self) -> bool:
        """Whether any term looks beyond the candidates."""
        return self.tail or self.distill_weight < 1 or self.hard_full_weight > 0

    def __call__(self, model: PreTrainedModel, batch: CachedBatch) -> LossSums:
        """Loss sums of one batch.

        No attention mask is needed: padding is on the right, so no real position sees it.
        """
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return self.of_hidden(model, hidden, batch).sums()

    def measured(self) -> Objective:
        """The KD term alone, for held-out text: stages with other hard-label weights stay
        comparable."""
        return replace(self, distill_weight=1.0, hard_top1_weight=0.0, hard_full_weight=0.0)

    def of_hidden(self, model: PreTrainedModel, hidden: Tensor, batch: CachedBatch) -> PositionLoss:
        """Losses of each position, given the decoder's last hidden states ``[B, L, D]``."""
        hidden = hidden[:, :-1]  # the last position predicts nothing that is cached
        head = model.get_output_embeddings().weight.detach()
        flat = hidden.reshape(-1, hidden.shape[-1])  # [P, D]
        own = candidate_logits(flat, head, batch.topk_ids.flatten(0, 1))
        shared = shared_logits(hidden, head, batch.negative_ids).flatten(0, 1)
        student = torch.cat([own, shared], dim=1)  # [P, K + R]
        teacher = torch.cat([batch.topk_logprobs, batch.negative_logprobs], dim=2).flatten(0, 1)
        usable = torch.cat(
            [torch.ones_like(batch.topk_ids, dtype=torch.bool), batch.negative_mask], dim=2
        ).flatten(0, 1)
        kd, labels, hard = self._terms(flat, head, batch, student, teacher, usable)
        soft = self.distill_weight * kd + (1 - self.distill_weight) * labels
        hard = self.hard_full_weight * hard
        if self.hard_top1_weight:
            hard = hard + self.hard_top1_weight * hard_top1(student, usable)
        return PositionLoss(kd=kd, soft=soft, hard=hard, mask=batch.mask.flatten())

    def _terms(
        self,
        flat: Tensor,
        head: Tensor,
        batch: CachedBatch,
        student: Tensor,
        teacher: Tensor,
        usable: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """KD, cross entropy on the labels and on the teacher's top-1, ``[P]`` each; what needs the
        vocabulary is 0 where nothing asks for it."""
        if not self.needs_full_vocabulary:
            kd = kd_candidates(student, teacher, usable, self.temperature)
            return kd, torch.zeros_like(kd), torch.zeros_like(kd)
        labels, top1 = batch.input_ids[:, 1:].flatten(), batch.topk_ids[:, :, 0].flatten()
        full = full_vocabulary(flat, head, labels, top1, self.temperature)
        if self.tail:
            scaled = batch.scaled_logsumexp[:, :, self.temperature_index].flatten()
            kd = kd_tail(student, full.scaled_logsumexp, teacher, scaled, usable, self.temperature)
        else:
            kd = kd_candidates(student, teacher, usable, self.temperature)
        by_label = cross_entropy(full.logsumexp, full.label_logit)
        return kd, by_label, cross_entropy(full.logsumexp, full.top1_logit)


def make_objective(
    cache: CacheReader,
    *,
    temperature: float,
    target: str,
    distill_weight: float = 1.0,
    hard_top1_weight: float = 0.0,
    hard_full_weight: float = 0.0,
) -> Objective:
    """The objective on one cache; ``target`` is ``candidates`` or ``tail``.

    Raises:
        MismatchError: the tail is wanted at a temperature that the cache does not hold.
    """
    tail = target == "tail"
    return Objective(
        temperature=temperature,
        tail=tail,
        temperature_index=temperature_column(cache.spec, temperature, tail),
        distill_weight=distill_weight,
        hard_top1_weight=hard_top1_weight,
        hard_full_weight=hard_full_weight,
    )


def temperature_column(spec: CacheSpec, temperature: float, tail: bool) -> int:
    """Column of the cache's log-sum-exps for ``temperature``; 0 when the tail is not used.

    Raises:
        MismatchError: the tail is wanted at a temperature that the cache does not hold.
    """
    if not tail:
        return 0
    if temperature not in spec.temperatures:
        raise MismatchError(
            f"distill.target tail at temperature {temperature} needs the cache's log-sum-exp "
            f"there; it holds {list(spec.temperatures)}: add it to cache.temperatures"
        )
    return list(spec.temperatures).index(temperature)
