"""What is learned from a teacher cache: the loss and the rows that its targets call for."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import MismatchError, ParamsError
from lib.cache.sampled import SampledBatches
from lib.cache.shards import CacheReader
from lib.objective.distillation import Objective, PositionLoss, make_objective
from lib.objective.loss import LossSums
from lib.objective.sampled import SampledObjective


class CachedLoss(Protocol):
    """An objective on cached targets of one kind; a :class:`lib.objective.loss.Loss`."""

    @property
    def name(self) -> str:
        """Of the term that held-out text is judged by."""

    def __call__(self, model: Any, batch: Any) -> LossSums:
        """Loss sums of one batch."""

    def measured(self) -> Objective:
        """The KD term on held-out text."""

    def of_hidden(self, model: PreTrainedModel, hidden: Tensor, batch: Any) -> PositionLoss:
        """Losses of each position, given the decoder's last hidden states ``[B, L, D]``."""


class CachedRows(Protocol):
    """The rows of a cache, in batches that the loss takes."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray) -> Any:
        """These rows, in this order."""

    def sequences(self, count: int) -> tuple[Tensor, Tensor]:
        """Input ids and lengths of the first ``count`` rows."""


def cached_lesson(
    train: CacheReader,
    val: CacheReader,
    *,
    temperature: float,
    target: str,
    distill_weight: float = 1.0,
    hard_top1_weight: float = 0.0,
    hard_full_weight: float = 0.0,
) -> tuple[CachedLoss, CachedRows]:
    """Loss and rows of training on the cache ``train``, judged on the cache ``val``.

    Args:
        target: of the top k, see :func:`make_objective`; sampled targets need none, but ``val`` has
            no others than the top k.

    Raises:
        MismatchError: the cache does not hold what the temperature or target needs.
        ParamsError: a term needs candidates, and the cache has none.
    """
    terms = {"distill_weight": distill_weight, "hard_full_weight": hard_full_weight}
    if train.spec.targets == "topk":
        terms["hard_top1_weight"] = hard_top1_weight
        return make_objective(train, temperature=temperature, target=target, **terms), train
    drawn_at = train.spec.sample_temperature
    if temperature != drawn_at:
        raise MismatchError(
            f"{train.folder} holds targets drawn at temperature {drawn_at} "
            f"(cache.sample_temperature), and the distillation's is {temperature}; set both to the "
            "same number and rerun the cache stage"
        )
    if hard_top1_weight:
        raise ParamsError(
            f"hard_top1_weight = {hard_top1_weight}: {train.folder} holds sampled targets, which "
            "are no candidates; set it to 0 and use hard_full_weight, or cache.targets to topk"
        )
    held_out = make_objective(val, temperature=temperature, target=target)
    loss = SampledObjective(held_out=held_out, temperature=temperature, **terms)
    return loss, SampledBatches(train)
