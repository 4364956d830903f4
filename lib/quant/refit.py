"""Refit of indices and scales to a weight, weighted by how much each input is used.

    minimize  sum_ij h_j (W_ij - LUT[idx_ij] (A B)_ij)^2     over idx, A, B in turn

`group` scales are s = A with the constant B = E, and over idx and s alone. `channel` scales are
s = A with B = f 1: over idx and the clip factor f, then over idx and s.

h_j = E[x_j^2] over calibration text: the expected squared error of the layer's *output*, its
inputs taken as uncorrelated. Plain weight error (h = 1) is a poor guide, see docs/math.md.

Shapes: W ``[out, in]``, Q = LUT[idx] ``[out, in]``, A ``[out, r]``, B ``[r, in]``, h ``[in]``,
s ``[out, groups]``, E ``[groups, in]``; of `channel` scales s ``[out, 1]`` and f ``[1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.quant.codebook import fit_kmeans, safe_ratio
from lib.quant.kernels import level_moments
from lib.quant.spec import LinearSpec, ScaleForm

DAMPING = 1e-3
"""Pull towards the previous factors, as a share of the Gram matrices' mean diagonal: ranks that
the data do not determine stay where they were."""


def _thin(wide: Tensor, rows: Tensor) -> Tensor:
    """``wide @ rows.T``, ``[n, m], [k, m] -> [n, k]`` for few rows. Where ``wide`` is a transposed
    view, the transposed product is up to nine times faster."""
    return wide @ rows.T if wide.is_contiguous() else (rows @ wide.T).T


def _solve_rows(squares: Tensor, products: Tensor, basis: Tensor, previous: Tensor) -> Tensor:
    """Rows a_i of ``[n, r]``: argmin sum_j w_ij (t_ij - q_ij a_i . b_j)^2 + damping.

    Args:
        squares, products: w q^2 and w t q, ``[n, m]``; basis: ``[r, m]``; previous: ``[n, r]``.
    """
    rank = basis.shape[0]
    i, j = torch.triu_indices(rank, rank, device=basis.device)
    triangle = _thin(squares, basis[i] * basis[j])  # Gram matrices are symmetric
    place = torch.empty(rank, rank, dtype=torch.long, device=basis.device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=basis.device)
    gram = triangle.index_select(1, place.flatten()).view(-1, rank, rank)
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-12  # [n]
    gram.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    right = _thin(products, basis) + damping[:, None] * previous
    return torch.linalg.solve(gram, right)


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
    even = torch.ones_like(used)
    for _ in range(steps):
        squares, products = level_moments(weight, a @ b, lut, used, affine=affine)
        a = _solve_rows(squares, products, b, a)
        squares, products = level_moments(weight, a @ b, lut, even, affine=affine)
        b = _solve_rows(squares.T, products.T, a.T, b.T).T.contiguous()
    return balance(a, b)


def _solve_groups(squares: Tensor, products: Tensor, members: Tensor, previous: Tensor) -> Tensor:
    """:func:`_solve_rows` for a basis E of groups, which share no input: each scale by itself,
    ``sum h W q / sum h q^2`` over its group.

    Args:
        squares, products: h q^2 and h W q, ``[out, in]``; previous: ``[out, groups]``.
    """
    gram = squares @ members.T  # [out, groups]
    damping = DAMPING * gram.mean(dim=1, keepdim=True) + 1e-12
    return (products @ members.T + damping * previous) / (gram + damping)


def refit_groups(
    weight: Tensor,
    s: Tensor,
    members: Tensor,
    lut: Tensor,
    importance: Tensor,
    *,
    steps: int,
    affine: bool,
) -> Tensor:
    """Alternate indices and s, ``steps`` times. No half step raises the error."""
    used = importance / importance.mean().clamp_min(1e-30)
    for _ in range(steps):
        moments = level_moments(weight, s @ members, lut, used, affine=affine)
        s = _solve_groups(*moments, members, s)
    return s


def _quotient(products: Tensor, squares: Tensor, previous: Tensor) -> Tensor:
    """argmin of squares x^2 - 2 products x, elementwise; the previous x where nothing decides."""
    return torch.where(squares > 0, products / squares, previous)


def solve_clip(squares: Tensor, products: Tensor, s: Tensor, previous: Tensor) -> Tensor:
    """The clip factor f ``[1]`` of least error, one number for the layer:

        f = sum h W q s / sum h q^2 s^2

    Args:
        squares, products: h q^2 and h W q, ``[out, in]``; s: ``[out, 1]``; previous: f ``[1]``.
    """
    rows = s[:, 0]
    own = (squares.sum(dim=1) * rows.square()).sum()
    return _quotient((products.sum(dim=1) * rows).sum(), own, previous)


def solve_channels(squares: Tensor, products: Tensor, f: Tensor, previous: Tensor) -> Tensor:
    """The scales s ``[out, 1]`` of least error under a clip factor f, each row by itself:

        s = sum_j h W q f / sum_j h q^2 f^2

    Args:
        squares, products: h q^2 and h W q, ``[out, in]``; f: ``[1]``; previous: s ``[out, 1]``.
    """
    own = squares.sum(dim=1, keepdim=True) * f.square()
    return _quotient(products.sum(dim=1, keepdim=True) * f, own, previous)


def refit_channels(
    weight: Tensor,
    s: Tensor,
    f: Tensor,
    lut: Tensor,
    importance: Tensor,
    *,
    steps: int,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """(s ``[out, 1]``, f ``[1]``): indices and f in turn, ``steps`` times, then indices and s as
    often. No half step raises the error.

    The first half finds the clip at which the weighted squared error is least; Apple does not
    publish how its clip factors start (Tech Report 2025).
    """
    used = importance / importance.mean().clamp_min(1e-30)
    for _ in range(steps):
        f = solve_clip(*level_moments(weight, s * f, lut, used, affine=affine), s, f)
    for _ in range(steps):
        s = solve_channels(*level_moments(weight, s * f, lut, used, affine=affine), f, s)
    return s, f


def refit(
    weight: Tensor, a: Tensor, b: Tensor, lut: Tensor, importance: Tensor, spec: LinearSpec
) -> tuple[Tensor, Tensor]:
    """(A, B), or (s, E) of `group` and (s, f 1) of `channel` scales, refitted as often as the spec
    says."""
    steps, affine = spec.refit_steps, spec.codebook.is_affine
    if spec.scale is ScaleForm.GROUP:
        return refit_groups(weight, a, b, lut, importance, steps=steps, affine=affine), b
    if spec.scale is ScaleForm.CHANNEL:
        f = b[0, :1]
        s, f = refit_channels(weight, a, f, lut, importance, steps=steps, affine=affine)
        return s, f.expand_as(b)
    return refit_factors(weight, a, b, lut, importance, steps=steps, affine=affine)


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
