"""Reading a cache of sampled targets.

Shapes: B rows of L tokens, P = L - 1 positions, K ids drawn for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.cache.shards import CacheReader, moved_fields
from lib.distill.sampling import importance_weights


@dataclass(frozen=True)
class SampledBatch:
    """Rows of a cache as tensors. Position p predicts ``input_ids[:, p + 1]``."""

    input_ids: Tensor
    """long ``[B, L]``, right-padded."""
    mask: Tensor
    """bool ``[B, P]``: the position predicts a real token, not padding."""
    sample_ids: Tensor
    """long ``[B, P, K]``, ascending."""
    logprobs: Tensor
    """float32 ``[B, P, K]``: the teacher's at ``sample_temperature``, rounded to float16."""
    weights: Tensor
    """float32 ``[B, P, K]``: importance weights (:mod:`lib.distill.sampling`)."""
    top1_ids: Tensor
    """long ``[B, P]``: the teacher's first choice."""

    def to(self, device: torch.device | str) -> SampledBatch:
        """The same batch on another device; a copy to a GPU does not wait for it."""
        return SampledBatch(**moved_fields(self, device))


class SampledBatches:
    """The rows of a cache of sampled targets, in place of :meth:`CacheReader.batch`."""

    def __init__(self, cache: CacheReader) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def sequences(self, count: int) -> tuple[Tensor, Tensor]:
        """See :meth:`CacheReader.sequences`."""
        return self.cache.sequences(count)

    def batch(self, rows: np.ndarray) -> SampledBatch:
        """These rows, in this order, as tensors on the CPU; raises as :meth:`CacheReader.gather`
        does."""
        spec = self.cache.spec
        raw = {name: torch.from_numpy(x) for name, x in self.cache.gather(rows).items()}
        logprobs = raw["sample_logprobs"].float()
        return SampledBatch(
            input_ids=raw["input_ids"].long(),
            mask=torch.arange(1, spec.max_length) < raw["length"][:, None],
            sample_ids=raw["sample_ids"].long(),
            logprobs=logprobs,
            weights=importance_weights(logprobs, raw["threshold"], spec.sample_power),
            top1_ids=raw["top1_ids"].long(),
        )
