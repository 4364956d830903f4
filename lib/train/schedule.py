"""Learning rates and the order of the data: pure functions of the step."""

from __future__ import annotations

import math

import numpy as np

from lib.params.training import LoopConfig


def rate_factor(step: int, params: LoopConfig) -> float:
    """Learning-rate multiplier of optimizer step ``step`` (from 0): linear warm-up, then
    constant, or a cosine down to ``min_rate_ratio`` at the last step."""
    if step < params.warmup_steps:
        return (step + 1) / params.warmup_steps
    if params.schedule == "constant":
        return 1.0
    span = max(1, params.steps - 1 - params.warmup_steps)
    done = min(1.0, (step - params.warmup_steps) / span)
    low = params.min_rate_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def rows_of(micro_batch: int, batch_size: int, total: int, seed: int) -> np.ndarray:
    """Cache rows of the n-th micro-batch: a fresh permutation per epoch, a pure function.

    Nothing but the counter has to be saved to resume.
    """
    wanted = np.arange(micro_batch * batch_size, (micro_batch + 1) * batch_size)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(wanted // total):
        inside = wanted // total == epoch
        order = np.random.default_rng([seed, int(epoch)]).permutation(total)
        rows[inside] = order[wanted[inside] % total]
    return rows
