"""Scales: initialization from group maxima and the exact change of form.

Shapes: W ``[out, in]``; group maxima M ``[out, groups]``; A ``[out, r]``, B ``[r, in]``,
g ``[r]``; S = A @ B (``lowrank``) or (A_dir * g) @ B_dir (``directional``) or s @ E (``group``)
with one scale per group, s ``[out, groups]``, and the constant E ``[groups, in]``; or f s
(``channel``) with one scale per output, s ``[out, 1]``, and one clip factor f ``[1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.quant.spec import LinearSpec, ScaleForm

MIN_MAXABS = 1e-8  # an all-zero group still gets a scale that can be divided by
MIN_NORM = 1e-6  # floor of a direction's norm, as in the reference implementation


def refine_group(in_features: int, group_size: int, rank: int) -> int:
    """Largest group size, halving from ``group_size``, with at least ``rank`` groups.

    A matrix with one value per group has rank at most ``in / group_size``; a higher rank
    would be filled with noise (576 inputs, rank 32: group 16, not 32).
    """
    group = min(group_size, in_features)
    while group > 1 and -(-in_features // group) < rank:
        group //= 2
    return group


def group_maxabs(weight: Tensor, group: int) -> Tensor:
    """max|w| of each run of ``group`` inputs: ``[out, ceil(in / group)]``, floored at 1e-8."""
    out_features, in_features = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -in_features % group))
    return padded.view(out_features, -1, group).amax(dim=2).clamp_min(MIN_MAXABS)


def expand_groups(groups: Tensor, group: int, in_features: int) -> Tensor:
    """Repeat each group's value over its inputs: ``[out, groups]`` -> ``[out, in]``."""
    return groups.repeat_interleave(group, dim=1)[:, :in_features]


def group_members(in_features: int, group: int) -> Tensor:
    """E ``[groups, in]``: 1 where an input belongs to a group, 0 elsewhere; the last group may be
    short. ``s @ E`` repeats each group's scale over its inputs, exactly: all other terms are 0."""
    return expand_groups(torch.eye(-(-in_features // group)), group, in_features)


def lowrank_from_groups(
    groups: Tensor, group: int, in_features: int, rank: int
) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of the *expanded* group matrix, from an SVD of the small one.

    The expansion P has orthogonal rows of norm sqrt(n_j) (n_j inputs in group j), so the SVD
    of M diag(sqrt(n)) is that of M P up to the repetition of the right vectors: the same
    result as the SVD of ``[out, in]``, on a matrix ``group`` times smaller.

    Returns:
        A ``[out, r]``, B ``[r, in]`` with the singular values split evenly; signs are fixed
        so that each column of A has a non-negative sum (SVD signs are arbitrary).
    """
    count = groups.shape[1]
    sizes = torch.full((count,), float(group), device=groups.device)
    sizes[-1] = in_features - group * (count - 1)
    u, s, vh = torch.linalg.svd(groups * sizes.sqrt(), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    sign = torch.where(u.sum(dim=0) < 0, -1.0, 1.0)
    root = s.sqrt()
    a = u * (root * sign)
    b = expand_groups(vh * (root * sign)[:, None] / sizes.sqrt(), group, in_features)
    return a.contiguous(), b.contiguous()


def initial_scale(
    weight: Tensor, *, group_size: int, rank: int, range_share: float, lut_max: float
) -> tuple[Tensor, Tensor]:
    """Factors whose product makes the outermost level stand for ``range_share * max|w|``."""
    out_features, in_features = weight.shape
    group = refine_group(in_features, group_size, rank)
    maxima = group_maxabs(weight.float(), group) * (range_share / lut_max)
    if rank > min(maxima.shape):  # cannot happen once check_shape passed
        raise ValueError(f"rank {rank} of a [{out_features}, {maxima.shape[1]}] group matrix")
    return lowrank_from_groups(maxima, group, in_features, rank)


def initial_factors(weight: Tensor, spec: LinearSpec, lut_max: float) -> tuple[Tensor, Tensor]:
    """(A ``[out, r]``, B ``[r, in]``) that scales start from; for `group` ones (s, E), for
    `channel` ones (s, f 1), the clip factor in every entry of B."""
    if spec.scale is ScaleForm.GROUP:
        maxima = group_maxabs(weight.float(), spec.group_size)
        members = group_members(weight.shape[1], spec.group_size).to(weight.device)
        return maxima * (spec.range / lut_max), members
    if spec.scale is ScaleForm.CHANNEL:
        maxima = group_maxabs(weight.float(), weight.shape[1])
        return maxima / lut_max, torch.full_like(weight[:1], spec.range, dtype=torch.float32)
    return initial_scale(
        weight,
        group_size=spec.group_size,
        rank=spec.rank,
        range_share=spec.range,
        lut_max=lut_max,
    )


def to_directional(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact change of form: unit columns of A, unit rows of B, magnitudes g = |A_k| |B_k|."""
    norm_a = a.norm(dim=0)
    norm_b = b.norm(dim=1)
    a_dir = a / norm_a.clamp_min(MIN_NORM)
    b_dir = b / norm_b.clamp_min(MIN_NORM)[:, None]
    return a_dir, b_dir, norm_a * norm_b


def unit_columns(a: Tensor) -> Tensor:
    """Columns scaled to norm 1 (norms floored at 1e-6)."""
    return a / a.norm(dim=0).clamp_min(MIN_NORM)


def unit_rows(b: Tensor) -> Tensor:
    """Rows scaled to norm 1 (norms floored at 1e-6)."""
    return b / b.norm(dim=1).clamp_min(MIN_NORM)[:, None]
