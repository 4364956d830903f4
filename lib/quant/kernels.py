"""The elementwise work on a quantized weight: levels looked up, indices searched, sums per level.

Each function runs as it stands (the reference) or compiled into one pass over memory
(torch.compile); both give the same bits. Layers too small to repay compiling, and machines without
a compiler, take it as it stands. An affine LUT (equally spaced up to FP16 rounding) is rounded to
and computed; for any other compiled code compares with every level, which vectorizes, and the
reference searches and looks up in memory.

Shapes: values, scale, weight, indices (uint8) ``[out, in]``; LUT ``[n]`` sorted ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.base.compiled import fused

_WORTH_COMPILING = 2**16  # entries of a weight
_WORTH_COMPILING_TURNS = 2**10  # the same of a step that is taken thousands of times
_UNROLLED = 16  # levels; up to here comparisons beat a look-up


def computed_levels(position: Tensor, lut: Tensor) -> Tensor:
    """Levels of an affine, symmetric LUT of FP16 values for whole-numbered float positions."""
    last = lut.numel() - 1
    exact = (2 * position - last) * (lut[-1] / last)
    # to 11 significant bits, as FP16 has (Veltkamp): compiled code drops `.half().float()`
    wide = exact * (2**13 + 1)
    return wide - (wide - exact)


def is_computable(lut: Tensor) -> bool:
    """Whether :func:`computed_levels` gives exactly the LUT's values."""
    places = torch.arange(lut.numel(), device=lut.device).float()
    return torch.equal(computed_levels(places, lut), lut)


def _levels(position: Tensor, lut: Tensor, affine: bool) -> Tensor:
    """``lut[position]`` for whole-numbered float positions."""
    if affine:
        return computed_levels(position, lut)
    size = lut.numel()
    if size > _UNROLLED or not torch.compiler.is_compiling():
        return lut.index_select(0, position.flatten().int()).view(position.shape)
    level = torch.where(position > 0.5, lut[1], lut[0])
    for k in range(2, size):
        level = torch.where(position > k - 0.5, lut[k], level)
    return level


def _scaled_levels(values: Tensor, indices: Tensor, lut: Tensor, affine: bool) -> Tensor:
    return values * _levels(indices.float(), lut, affine)


def affine_position(ratio: Tensor, lut: Tensor) -> Tensor:
    """Index (as float) of the nearest of equally spaced levels; ties go to the lower one."""
    last = lut.numel() - 1
    per_unit = last / (lut[-1] - lut[0])
    return (ratio * per_unit - lut[0] * per_unit - 0.5).ceil().clamp(0, last)


def searched_position(ratio: Tensor, lut: Tensor) -> Tensor:
    """Index (as float) of the nearest level of any sorted LUT; ties go to the lower one."""
    edges = (lut[1:] + lut[:-1]) / 2
    if lut.numel() > _UNROLLED or not torch.compiler.is_compiling():
        return torch.bucketize(ratio, edges).float()
    position = torch.where(ratio > edges[0], 1.0, 0.0)
    for k in range(1, lut.numel() - 1):
        position = torch.where(ratio > edges[k], k + 1.0, position)
    return position


def _nearest(weight: Tensor, scale: Tensor, lut: Tensor, affine: bool) -> Tensor:
    # 0 / 0 is 0; a scale of 0 alone gives +-inf. `isnan` would not vectorize when compiled.
    ratio = torch.where(weight == 0, 0.0, weight / scale)
    return affine_position(ratio, lut) if affine else searched_position(ratio, lut)


def _quantized(weight: Tensor, scale: Tensor, lut: Tensor, affine: bool) -> tuple[Tensor, Tensor]:
    position = _nearest(weight, scale, lut, affine)
    return scale * _levels(position, lut, affine), position.to(torch.uint8)


def _nearest_of_each(value: Tensor, scale: Tensor, lut: Tensor) -> tuple[Tensor, Tensor]:
    ratio = torch.where(value == 0, 0.0, value / scale)
    edges = (lut[:, 1:] + lut[:, :-1]) / 2
    size = lut.shape[1]
    if size > _UNROLLED or not torch.compiler.is_compiling():
        position = torch.searchsorted(edges, ratio)
        return position.to(torch.uint8), lut.gather(1, position) * scale
    index, level = torch.where(ratio > edges[:, :1], 1.0, 0.0), lut[:, :1]
    level = torch.where(ratio > edges[:, :1], lut[:, 1:2], level)
    for k in range(1, size - 1):
        above = ratio > edges[:, k : k + 1]
        index = torch.where(above, k + 1.0, index)
        level = torch.where(above, lut[:, k + 1 : k + 2], level)
    return index.to(torch.uint8), level * scale


def _level_moments(
    weight: Tensor, scale: Tensor, lut: Tensor, used: Tensor, affine: bool
) -> tuple[Tensor, Tensor]:
    level = _levels(_nearest(weight, scale, lut, affine), lut, affine)
    part = used * level
    return part * level, part * weight


def grid_points(weight: Tensor, scale: Tensor, lut: Tensor, affine: bool) -> Tensor:
    """``LUT[idx] * S`` for the nearest levels of ``weight / scale``: where each weight snaps to.

    As it stands; functions that are compiled may call it.
    """
    return scale * _levels(_nearest(weight, scale, lut, affine), lut, affine)


def _pulled(weight: Tensor, scale: Tensor, lut: Tensor, share: Tensor, affine: bool) -> Tensor:
    away = weight - grid_points(weight, scale, lut, affine)
    weight.sub_(share * away)
    return away.square().sum(dim=1)


def _row_sums(values: Tensor, indices: Tensor, size: int) -> Tensor:
    position = indices.float()
    rows = [torch.where(position == k, values, 0.0).sum(dim=1) for k in range(size)]
    return torch.stack(rows)


def scaled_levels(
    values: Tensor, indices: Tensor, lut: Tensor, *, affine: bool = False, often: bool = True
) -> Tensor:
    """``values * LUT[indices]``: W_q from S, and the gradient of S from that of W_q.

    Args:
        affine: :func:`is_computable` holds; a rounding replaces the look-up.
        often: False where it is asked once per layer: compiling would take longer.
    """
    if not often:
        return _scaled_levels(values, indices, lut, affine)
    return fused(_scaled_levels, values, indices, lut, affine, worth=_WORTH_COMPILING)


def quantized(weight: Tensor, scale: Tensor, lut: Tensor, *, affine: bool) -> tuple[Tensor, Tensor]:
    """``(LUT[idx] * S, idx)`` for the nearest levels idx (uint8) of ``weight / scale``.

    Args:
        affine: :func:`is_computable` holds; a rounding replaces the comparisons.
    """
    return fused(_quantized, weight, scale, lut, affine, worth=_WORTH_COMPILING)


def nearest_of_each(value: Tensor, scale: Tensor, lut: Tensor) -> tuple[Tensor, Tensor]:
    """``(idx, LUT[idx] * scale)`` for the levels nearest to ``value / scale``, idx uint8, each row
    with a LUT of its own. Asked thousands of times for few values.

    Args:
        value, scale: ``[n, m]``; lut: ``[n, levels]``, each sorted ascending.
    """
    return fused(_nearest_of_each, value, scale, lut, worth=_WORTH_COMPILING_TURNS)


def level_moments(
    weight: Tensor, scale: Tensor, lut: Tensor, used: Tensor, *, affine: bool
) -> tuple[Tensor, Tensor]:
    """``(h q^2, h W q)`` for the nearest levels q of ``weight / scale`` and h = ``used [in]``."""
    return fused(_level_moments, weight, scale, lut, used, affine, worth=_WORTH_COMPILING)


def pull_to_grid(
    weight: Tensor, scale: Tensor, lut: Tensor, share: Tensor, *, affine: bool
) -> Tensor:
    """Move each weight by a share of its way to its grid point, in place.

    Args:
        share: scalar from 0 to 1.

    Returns:
        the squared distances before, summed over each row, ``[out]``.
    """
    return fused(_pulled, weight, scale, lut, share, affine, worth=_WORTH_COMPILING)


def level_sums(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """Sum of the values that belong to each level, ``[n]``, exact to float32.

    Rows are summed in float32, their sums in float64 (Apple's GPUs have none: float32 there): a
    level collects up to millions of terms.
    """
    rows = fused(_row_sums, values, indices, size, worth=_WORTH_COMPILING)  # [n, out]
    exact = rows if rows.device.type == "mps" else rows.double()
    return exact.sum(dim=1).to(values.dtype)
