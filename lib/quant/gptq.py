"""Indices by error feedback: GPTQ on a LUT with given scales.

    minimize  tr (W - W_q) H (W - W_q)^T,   W_q = LUT[idx] * S,   H = E[x x^T]

over idx, one input after the other: each takes its nearest level, and what that misses is made
good, as far as H allows, by the inputs that are still free. With U the upper Cholesky factor of
the damped H's inverse, quantizing input j moves the free ones by ``-(w_j - q_j) / U_jj * U_j``:
optimal brain surgery without inverting anew for each input (Frantar et al., "GPTQ", 2023, section
3.3). Inputs are taken by falling H_jj: S is known beforehand, so any order will do.

An input that was taken early knew nothing of what later ones would miss. Coordinate descent goes
through all inputs again and gives each the level that is best beside the levels of all others; no
step raises the error (Behdin et al., "QuantEase", 2023).

Shapes: W, S, idx ``[out, in]``, H ``[in, in]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lib.quant.codebook import assign, safe_ratio
from lib.quant.ste import lookup

DAMPING = 1e-2
"""Added to the diagonal of H, as a share of its mean (the paper's value)."""
BLOCK = 128
"""Inputs whose corrections stay among themselves until all of them are quantized."""


def damped(moments: Tensor) -> Tensor:
    """H with a little on its diagonal, as a copy."""
    found = moments.clone()
    found.diagonal().add_(DAMPING * found.diagonal().mean() + 1e-12)
    return found


def inverse_factor(moments: Tensor) -> Tensor:
    """U ``[in, in]`` float32, upper: ``U^T U`` is the inverse of the damped H."""
    there = moments.device
    # MPS has no float64
    found = damped((moments.cpu() if there.type == "mps" else moments).double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(found))
    return torch.linalg.cholesky(inverse, upper=True).float().to(there)


class Feedback(NamedTuple):
    """Which levels were chosen, and why."""

    indices: Tensor
    """uint8 ``[out, in]``."""
    weight: Tensor
    """``[out, in]``: each weight as it was when its level was chosen, with what other inputs had
    missed. Its nearest level is the chosen one."""


def _rows(order: Tensor, *matrices: Tensor) -> list[Tensor]:
    """Each ``[out, in]`` as ``[in, out]``, its inputs in the order in which they are taken."""
    return [matrix.T[order].contiguous() for matrix in matrices]


def _columns(order: Tensor, *matrices: Tensor) -> list[Tensor]:
    """Inverse of :func:`_rows`."""
    return [matrix[order.argsort()].T.contiguous() for matrix in matrices]


def error_feedback(
    weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor, *, affine: bool
) -> Feedback:
    """Levels ``lut [n]`` for a weight under given scales S.

    Args:
        moments: H, the mean of x x^T over calibration text, float32 ``[in, in]``.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments[order][:, order])
    free, scales = _rows(order, weight, scale)
    chosen = torch.empty(free.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(free), BLOCK):
        stop = min(start + BLOCK, len(free))
        missed = torch.empty_like(free[start:stop])
        for j in range(start, stop):
            chosen[j] = assign(safe_ratio(free[j], scales[j]), lut, affine=affine)
            missed[j - start] = (free[j] - lookup(lut, chosen[j]) * scales[j]) / factor[j, j]
            free[j + 1 : stop] -= factor[j, j + 1 : stop, None] * missed[j - start]
        free[stop:] -= factor[start:stop, stop:].T @ missed
    return Feedback(*_columns(order, chosen, free))


def descend(
    weight: Tensor,
    scale: Tensor,
    lut: Tensor,
    moments: Tensor,
    start: Feedback,
    *,
    steps: int,
    affine: bool,
) -> Feedback:
    """Improve levels by ``steps`` rounds of coordinate descent.

    Args:
        weight, scale, lut, moments: as given to :func:`error_feedback`, which found ``start``.
    """
    products = damped(moments)
    order = products.diagonal().argsort(descending=True, stable=True)
    products = products[order][:, order].contiguous()
    wanted, scales, chosen, moved = _rows(order, weight, scale, *start)
    missed = wanted - lookup(lut, chosen) * scales  # [in, out]
    for first in list(range(0, len(wanted), BLOCK)) * steps:
        rows = slice(first, first + BLOCK)
        near = products[rows, rows]
        slope = products[rows] @ missed  # of half the error, by the weights of this block
        for k, j in enumerate(range(len(wanted))[rows]):
            moved[j] = wanted[j] - missed[j] + slope[k] / near[k, k]
            chosen[j] = assign(safe_ratio(moved[j], scales[j]), lut, affine=affine)
            now = wanted[j] - lookup(lut, chosen[j]) * scales[j]
            slope[k + 1 :].addr_(near[k + 1 :, k], now - missed[j])
            missed[j] = now
    return Feedback(*_columns(order, chosen, moved))


def output_error(difference: Tensor, moments: Tensor) -> float:
    """tr D H D^T: the mean squared output of a weight D ``[out, in]``, summed over outputs."""
    return float(((difference @ moments) * difference).sum())
