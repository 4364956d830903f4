"""The distillation objective of every training stage, from cached teacher targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import MismatchError
from lib.base.workers import rank, total, world_size
from lib.cache.shards import CachedBatch, CacheReader
from lib.cache.spec import CacheSpec
from lib.distill.head import candidate_logits, full_vocabulary, shared_logits
from lib.distill.losses import cross_entropy, hard_top1, kd_candidates, kd_tail


@dataclass(frozen=True)
class LossSums:
    """Sums over the positions that predict a real token; divide by ``count`` for means."""

    total: Tensor
    kd: Tensor
    count: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``total = w KD + (1 - w) CE(labels) + h1 CE(top-1 | candidates) + hf CE(top-1)``.

    Attributes:
        temperature: T of the KD term.
        tail: KD over the candidates and one class for the rest, not over the candidates alone.
        temperature_index: column of the cache's scaled log-sum-exps that belongs to T (tail).
        distill_weight: w; hard_top1_weight: h1; hard_full_weight: hf.
    """

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
        mask = batch.mask.flatten()
        kd, extra = self._terms(flat, head, batch, student, teacher, usable)
        total = self.distill_weight * kd + extra
        if self.hard_top1_weight:
            total = total + self.hard_top1_weight * hard_top1(student, usable)
        zero = torch.zeros((), device=kd.device)
        return LossSums(
            torch.where(mask, total, zero).sum(),
            torch.where(mask, kd, zero).sum().detach(),
            mask.sum(),
        )

    def _terms(
        self,
        flat: Tensor,
        head: Tensor,
        batch: CachedBatch,
        student: Tensor,
        teacher: Tensor,
        usable: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """KD ``[P]`` and the sum of the full-vocabulary terms ``[P]``."""
        if not self.needs_full_vocabulary:
            kd = kd_candidates(student, teacher, usable, self.temperature)
            return kd, torch.zeros_like(kd)
        labels, top1 = batch.input_ids[:, 1:].flatten(), batch.topk_ids[:, :, 0].flatten()
        full = full_vocabulary(flat, head, labels, top1, self.temperature)
        if self.tail:
            scaled = batch.scaled_logsumexp[:, :, self.temperature_index].flatten()
            kd = kd_tail(student, full.scaled_logsumexp, teacher, scaled, usable, self.temperature)
        else:
            kd = kd_candidates(student, teacher, usable, self.temperature)
        extra = (1 - self.distill_weight) * cross_entropy(full.logsumexp, full.label_logit)
        extra = extra + self.hard_full_weight * cross_entropy(full.logsumexp, full.top1_logit)
        return kd, extra


class Distillation(nn.Module):
    """A model and its objective as one module: what data parallelism wraps."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: CachedBatch) -> LossSums:
        """Loss sums of one batch."""
        return self.objective(self.model, batch)


EVAL_BATCH = 8  # sequences; one quantization of the model serves a whole forward pass


@torch.no_grad()
def held_out_kd(
    model: PreTrainedModel,
    objective: Objective,
    cache: CacheReader,
    sequences: int,
    device: torch.device,
) -> float:
    """Mean KD loss over the first ``sequences`` sequences of a cache (all, if it has fewer).

    Several processes share the sequences, and all get the mean. Only the KD term counts: stages
    with other hard-label weights stay comparable.
    """
    measure = replace(objective, distill_weight=1.0, hard_top1_weight=0.0, hard_full_weight=0.0)
    count = min(sequences, len(cache))
    kd_sum, positions = 0.0, 0
    together = EVAL_BATCH * world_size()
    for start in range(0, count, together):
        rows = np.arange(start, min(start + together, count))
        mine = rows[rank() :: world_size()]
        # a model in shards needs every process in every forward pass, work or not
        sums = measure(model, cache.batch(mine if len(mine) else rows[:1]).to(device))
        if len(mine):
            kd_sum += float(sums.kd)
            positions += int(sums.count)
    if world_size() > 1:
        both = torch.tensor([kd_sum, positions], dtype=torch.float64, device=device)
        both = total(both)
        kd_sum, positions = float(both[0]), int(both[1])
    return kd_sum / max(positions, 1)


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
