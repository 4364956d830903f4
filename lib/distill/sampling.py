"""Targets drawn at random: K ids of a position that stand, in the mean, for the whole vocabulary.

Shapes: P positions, V vocabulary, K ids kept, p the teacher's distribution.

Random sampling knowledge distillation draws n ids from a proposal q, proportional to p^t, and gives
an id that was drawn c times the weight c / n * p / q, in the mean p. Here the n draws are equally
spaced, with one random shift for all of them: c is then one of the two integers next to n q, and no
other way of drawing has a smaller variance of c. An id with n q >= 1 is drawn for certain; it is
kept once, with the mean of its weight, p. Any other is drawn once, with probability n q, or not at
all, and weighs 1 / n * p / q. All K ids differ for the n, not always whole, of

    sum_v min(1, n q_v) = K,        pi_v = min(1, n q_v),        w_v = p_v / pi_v.

Over the shift, sum_k w_k f(id_k) has the mean sum_v p_v f(v) for any f. With t = 1 the weights of
every draw sum to 1 exactly. With K = V all ids are certain and w = p.

Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (ACL
2025): draws from a proposal, unbiased gradients. Madow, "On the theory of systematic sampling, II"
(1949): equal spacing. Horvitz and Thompson, "A generalization of sampling without replacement from
a finite universe" (1952): weights p / pi.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 1e-300  # of p^t: where fewer than K ids have any probability, others fill the places


class Drawn(NamedTuple):
    """Ids ``[P, K]``, long and ascending, and log thresholds ``[P]``: of p^t, at and above which an
    id is certain (1 / n, but for the normalization of q)."""

    ids: Tensor
    threshold: Tensor


def draw(logprobs: Tensor, shifts: Tensor, count: int, power: float) -> Drawn:
    """Draw ``count`` different ids for each position.

    A row of the result is a function of the same row of the arguments alone. Computed in float64,
    on the CPU where the device has none.

    Args:
        logprobs: log p, float ``[P, V]``, normalized; V is at least ``count``.
        shifts: uniform in [0, 1), ``[P]``: all that is random.
        power: t, above 0.
    """
    if logprobs.device.type == "mps":
        logprobs, shifts = logprobs.cpu(), shifts.cpu()
    mass = (power * logprobs.double()).exp_().clamp_(min=_LEAST)
    threshold = _threshold(mass, count)
    ends = mass.div_(threshold).clamp_(max=1).cumsum(dim=1)  # of stretches as long as pi
    places = torch.arange(count, device=mass.device)
    ids = torch.searchsorted(ends, shifts.double()[:, None] + places, right=True)
    # a stretch of length 1 may hold two points by rounding, and the last point lie behind the end
    ids = (ids - places).cummax(dim=1).values + places
    ids = ids.minimum(mass.shape[1] - count + places)
    return Drawn(ids, threshold.squeeze(1).log())


def _threshold(mass: Tensor, count: int) -> Tensor:
    """The number h ``[P, 1]`` for which ``sum_v min(1, mass_v / h)`` is ``count``.

    With the m largest certain, h is the mass of the others over ``count - m``; m is the smallest
    for which none of the others is above h.
    """
    top = mass.topk(count, dim=1)
    rest = mass.scatter(1, top.indices, 0.0).sum(dim=1, keepdim=True)
    left = rest + top.values.flip(1).cumsum(dim=1).flip(1)  # column m: without the m largest
    found = left / torch.arange(count, 0, -1, device=mass.device)
    certain = (top.values <= found).int().argmax(dim=1, keepdim=True)
    return found.gather(1, certain)


def importance_weights(logprobs: Tensor, threshold: Tensor, power: float) -> Tensor:
    """w = p / pi ``[..., K]`` of ids that were drawn.

    Args:
        logprobs: log p of these ids, ``[..., K]``; threshold, power: as in :func:`draw`.
    """
    # log p - min(0, t log p - h), without differences of large numbers
    return logprobs.maximum((1 - power) * logprobs + threshold[..., None]).exp()
