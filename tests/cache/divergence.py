"""How far a decoded teacher is from the exact one."""

from __future__ import annotations

import numpy as np

from lib.cache.spec import CacheSpec


def divergence(exact: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> np.ndarray:
    """KL ``[B, P]`` at T = 1 over the renormalized top k."""
    one, other = (_by_id(columns) for columns in (exact, found))
    one, other = (x - np.log(np.exp(x).sum(axis=2, keepdims=True)) for x in (one, other))
    return (np.exp(one) * (one - other)).sum(axis=2)


def divergence_with_rest(
    exact: dict[str, np.ndarray], found: dict[str, np.ndarray], spec: CacheSpec, column: int
) -> np.ndarray:
    """T^2 KL ``[B, P]`` at one of the spec's temperatures, over top k and the rest as a class."""
    t = spec.temperatures[column]
    parts = []
    for columns in (exact, found):
        inside = _by_id(columns) / t - columns["scaled_logsumexp"][:, :, column, None]
        rest = np.maximum(1 - np.exp(inside).sum(axis=2, keepdims=True), 1e-7)
        parts.append(np.concatenate([inside, np.log(rest)], axis=2))
    return t**2 * (np.exp(parts[0]) * (parts[0] - parts[1])).sum(axis=2)


def _by_id(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Log-probabilities float64 in ascending order of their ids."""
    order = columns["topk_ids"].argsort(axis=2)
    return np.take_along_axis(columns["topk_logprobs"], order, axis=2).astype(np.float64)
