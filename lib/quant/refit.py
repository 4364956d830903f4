"""Refit of indices and low-rank scales to a weight, weighted by how much each input is used.

    minimize  sum_ij h_j (W_ij - LUT[idx_ij] (A B)_ij)^2     over idx, A, B in turn

h_j = E[x_j^2] over calibration text: the expected squared error of the layer's *output*, its
inputs taken as uncorrelated. Plain weight error (h = 1) is a poor guide, see docs/math.md.

Shapes: W ``[out, in]``, Q = LUT[idx] ``[out, in]``, A ``[out, r]``, B ``[r, in]``, h ``[in]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.quant.codebook import assign, fit_kmeans, safe_ratio
from lib.quant.ste import lookup

DAMPING = 1e-3
"""Pull towards the previous factors, as a share of the Gram matrices' mean diagonal: ranks that
the data do not determine stay where they were."""


def _solve_rows(
    target: Tensor, levels: Tensor, basis: Tensor, weights: Tensor, previous: Tensor
) -> Tensor:
    """Rows a_i of ``[n, r]``: argmin sum_j w_j (t_ij - q_ij a_i . b_j)^2 + damping.

    Args:
        target, levels: ``[n, m]``; basis: ``[r, m]``; weights: ``[m]``; previous: ``[n, r]``.
    """
    rank = basis.shape[0]
    outer = (basis[:, None, :] * basis[None, :, :]).reshape(rank * rank, -1)  # [r * r, m]
    gram = ((levels * levels * weights) @ outer.T).view(-1, rank, rank)
    right = (target * levels * weights) @ basis.T
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-12  # [n]
    gram.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    return torch.linalg.solve(gram, right + damping[:, None] * previous)


def refit_factors(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    lut: Tensor,
    importance: Tensor,
    *,
    steps: int,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """Alternate indices, A, indices, B, ``steps`` times. No half step raises the error: the
    damping only holds the factors back on the way to its minimum."""
    used = importance / importance.mean().clamp_min(1e-30)
    even = torch.ones(weight.shape[0], device=weight.device)
    for _ in range(steps):
        levels = lookup(lut, assign(safe_ratio(weight, a @ b), lut, affine=affine))
        a = _solve_rows(weight, levels, b, used, a)
        levels = lookup(lut, assign(safe_ratio(weight, a @ b), lut, affine=affine))
        b = _solve_rows(weight.T, levels.T, a.T, even, b.T).T.contiguous()
    return balance(a, b)


def balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with |A_k| = |B_k| for every rank: both factors train at one rate, and
    neither leaves the range of FP16."""
    norm_a, norm_b = a.norm(dim=0).clamp_min(1e-30), b.norm(dim=1).clamp_min(1e-30)
    share = (norm_b / norm_a).sqrt()
    return a * share, b / share[:, None]


def weighted_error(weight: Tensor, quantized: Tensor, importance: Tensor) -> float:
    """sum_ij h_j (W - W_q)_ij^2 / sum_ij h_j W_ij^2, the share of output energy lost."""
    lost = ((weight - quantized).square() * importance).sum()
    return float(lost / (weight.square() * importance).sum().clamp_min(1e-30))


def fit_codebook(weight: Tensor, a: Tensor, b: Tensor, size: int, importance: Tensor) -> Tensor:
    """k-means LUT ``[size]`` for W / S, each value weighted by h_j S_ij^2 (its share of the
    output error)."""
    scale = a @ b
    return fit_kmeans(safe_ratio(weight, scale), size, scale.square() * importance)
