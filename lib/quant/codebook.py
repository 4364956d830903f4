"""Codebooks (LUTs) and the search for the nearest level.

Shapes: LUT ``[n]`` sorted ascending, n a power of two; ratios ``w / S`` of any shape.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lib.base.errors import ParamsError
from lib.quant.kernels import affine_position, searched_position
from lib.quant.spec import Codebook

_HISTOGRAM_BINS = 4096  # 1-D k-means runs on a histogram: cost independent of the layer's size
_CUT_MASS = 5e-5  # share at either end that the histogram does not resolve: outliers of W / S


def make_codebook(kind: Codebook, size: int) -> Tensor:
    """LUT ``[size]``, float32 holding FP16-exact values, sorted, symmetric.

    ``uniform``: linspace(-1, 1). ``balanced``: half integers, {-1.5, -0.5, 0.5, 1.5} at 2 bits.
    ``kmeans`` and ``learned`` start from ``uniform`` (fitted by :func:`fit_kmeans`, trained).

    Raises:
        ParamsError: size is no power of two from 2 to 256.
    """
    if size not in {2**bits for bits in range(1, 9)}:
        raise ParamsError(f"lut_size {size} is not allowed; use a power of two from 2 to 256")
    if kind is Codebook.BALANCED:
        levels = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    else:
        levels = torch.linspace(-1, 1, size, dtype=torch.float64)
    return levels.half().float()


def assign(ratio: Tensor, lut: Tensor, *, affine: bool) -> Tensor:
    """Index of the nearest LUT entry for each ratio, uint8, same shape.

    Ties go to the lower index. With ``affine`` (equally spaced levels) a rounding replaces the
    search over boundaries.
    """
    search = affine_position if affine else searched_position
    return search(ratio, lut).to(torch.uint8)


def cell_edges(lut: Tensor, *, affine: bool) -> Tensor:
    """Where :func:`assign` passes from one level to the next, ``[n - 1]``.

    With ``affine`` they are equally spaced: up to FP16's rounding of the levels, the midpoints.
    """
    if affine:
        steps = torch.arange(lut.numel() - 1, dtype=lut.dtype, device=lut.device) + 0.5
        return lut[0] + steps * ((lut[-1] - lut[0]) / (lut.numel() - 1))
    return (lut[1:] + lut[:-1]) / 2


def safe_ratio(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight / scale``; 0 where both are 0, +-inf (an outermost level) where only S is."""
    return (weight / scale).nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf"))


def _cut_outliers(values: Tensor, mass: Tensor) -> Tensor:
    """``values`` clamped to where the central 99.99 % of the mass lies."""
    order = torch.from_numpy(np.argsort(values.numpy()))  # four times as fast as torch's sort
    ordered, cumulative = values[order], mass[order].cumsum(0)
    cuts = torch.tensor([_CUT_MASS, 1 - _CUT_MASS], dtype=torch.float64) * cumulative[-1]
    low, high = ordered[torch.searchsorted(cumulative, cuts)]
    return values.clamp(low, high)


def fit_kmeans(ratio: Tensor, size: int, weights: Tensor | None = None, steps: int = 50) -> Tensor:
    """1-D k-means (Lloyd) on the values of ``ratio``, optionally weighted; LUT ``[size]``.

    Runs on a histogram of 4,096 bins over the central 99.99 % of the mass (what lies beyond
    counts as its ends) and starts from the quantiles, so that it is deterministic without a
    seed. ``ratio`` may be infinite where its weight is 0. Runs on the CPU, in float64.
    """
    values = ratio.detach().flatten().cpu().double()
    mass = torch.ones_like(values) if weights is None else weights.flatten().cpu().double()
    values = _cut_outliers(values, mass)
    low, high = values.min(), values.max()
    span = (high - low).clamp_min(1e-12)
    bins = ((values - low) / span * (_HISTOGRAM_BINS - 1)).round().long()
    count = torch.zeros(_HISTOGRAM_BINS, dtype=torch.float64).scatter_add_(0, bins, mass)
    total = torch.zeros_like(count).scatter_add_(0, bins, mass * values)
    filled = count > 0
    x, m = total[filled] / count[filled], count[filled]
    quantiles = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    start = torch.searchsorted(m.cumsum(0) / m.sum(), quantiles).clamp_max(len(x) - 1)
    lut = x[start]
    for _ in range(steps):
        index = torch.bucketize(x, cell_edges(lut, affine=False))
        sums = torch.zeros(size, dtype=torch.float64).scatter_add_(0, index, m * x)
        masses = torch.zeros(size, dtype=torch.float64).scatter_add_(0, index, m)
        lut = torch.where(masses > 0, sums / masses.clamp_min(1e-300), lut).sort().values
    return distinct_fp16(lut.float()).to(ratio.device)


def distinct_fp16(lut: Tensor) -> Tensor:
    """Round a sorted LUT to FP16 so that neighbours stay distinct: equal ones move one step up."""
    rounded = lut.sort().values.half()
    infinity = torch.tensor(float("inf"), dtype=torch.float16)
    for i in range(1, rounded.numel()):
        if rounded[i] <= rounded[i - 1]:
            rounded[i] = torch.nextafter(rounded[i - 1], infinity)
    return rounded.float()


@torch.no_grad()
def project_learned(lut: Tensor) -> Tensor:
    """Nearest admissible learned LUT: sorted, symmetric (lut[i] = -lut[n-1-i]), FP16-distinct.

    Values stay float32 masters; what is guaranteed is that their FP16 rounding is distinct.
    """
    ordered = lut.sort().values
    half = ((ordered - ordered.flip(0)) / 2)[lut.numel() // 2 :]
    # Positive half, ascending; a gap of two FP16 spacings survives the rounding.
    floor = torch.finfo(torch.float16).tiny
    levels: list[float] = []
    for value in half.tolist():
        least = floor if not levels else levels[-1] * (1 + 2**-9) + 2**-23
        levels.append(max(value, least))
    upper = torch.tensor(levels, dtype=lut.dtype, device=lut.device)
    return torch.cat([-upper.flip(0), upper])
