"""Indices by error feedback: GPTQ on a LUT with given scales, several layers side by side.

    minimize  tr (W - W_q) H (W - W_q)^T,   W_q = LUT[idx] * S,   H = E[x x^T]

over idx, one input after the other: each takes its nearest level, and what that misses is made
good, as far as H allows, by the inputs that are still free. With U the upper Cholesky factor of
the damped H's inverse, quantizing input j moves the free ones by ``-(w_j - q_j) / U_jj * U_j``:
optimal brain surgery without inverting anew for each input (Frantar et al., "GPTQ", 2023, section
3.3). Inputs are taken by falling H_jj: S is known beforehand, so any order will do.

An input that was taken early knew nothing of what later ones would miss. Coordinate descent goes
through all inputs again and gives each the level that is best beside the levels of all others; no
step raises the error (Behdin et al., "QuantEase", 2023).

Inputs follow one another, layers do not: n layers of one shape take the same number of turns as
one, and most of a turn is the calling of small operations.

Shapes: W, S, idx ``[n, out, in]``, LUT ``[n, levels]``, H ``[n, in, in]``; while they are worked on
``[in, n, out]``: a turn's values lie together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lib.quant.kernels import nearest_of_each
from lib.quant.ste import lookup

DAMPING = 1e-2
"""Added to the diagonal of H, as a share of its mean (the paper's value)."""
BLOCK = 32
"""Inputs whose corrections stay among themselves until all of them are quantized."""


def damped(moments: Tensor) -> Tensor:
    """H ``[in, in]`` with a little on its diagonal, as a copy."""
    found = moments.clone()
    found.diagonal().add_(DAMPING * found.diagonal().mean() + 1e-12)
    return found


def inverse_factor(moments: Tensor) -> Tensor:
    """U ``[in, in]`` float32, upper: ``U^T U`` is the inverse of the damped H.

    The Cholesky factor of H read backwards gives ``H = R R^T`` with R upper; U is R's inverse.
    """
    there = moments.device
    # MPS has no float64
    found = damped((moments.cpu() if there.type == "mps" else moments).double())
    backwards = torch.linalg.cholesky(found.flip(0, 1)).flip(0, 1)
    one = torch.eye(len(found), dtype=found.dtype, device=found.device)
    return torch.linalg.solve_triangular(backwards, one, upper=True).float().to(there)


class Feedback(NamedTuple):
    """Which levels were chosen, and why."""

    indices: Tensor
    """uint8 ``[n, out, in]``."""
    weight: Tensor
    """``[n, out, in]``: each weight as it was when its level was chosen, with what other inputs had
    missed. Its nearest level is the chosen one."""


def _order(moments: Tensor) -> Tensor:
    """Inputs ``[n, in]`` in the order in which they are taken."""
    return moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def _rows(order: Tensor, *matrices: Tensor) -> list[Tensor]:
    """Each ``[n, out, in]`` as ``[in, n, out]``, its inputs in order."""
    return [
        torch.stack([one.T[at] for one, at in zip(matrix, order, strict=True)], dim=1)
        for matrix in matrices
    ]


def _columns(order: Tensor, *matrices: Tensor) -> list[Tensor]:
    """Inverse of :func:`_rows`."""
    back = order.argsort(dim=1)
    return [torch.stack([matrix[at, i].T for i, at in enumerate(back)]) for matrix in matrices]


def error_feedback(weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor) -> Feedback:
    """Levels for weights under given scales.

    Args:
        moments: H, the mean of x x^T over calibration text, float32 ``[n, in, in]``.
    """
    order = _order(moments)
    factor = torch.stack(
        [inverse_factor(one[at][:, at]) for one, at in zip(moments, order, strict=True)]
    )
    pivots = factor.diagonal(dim1=1, dim2=2).T[:, :, None]  # [in, n, 1]
    free, scales = _rows(order, weight, scale)
    chosen = torch.empty(free.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(free), BLOCK):
        stop = min(start + BLOCK, len(free))
        missed = torch.empty_like(free[start:stop])
        for j in range(start, stop):
            chosen[j], level = nearest_of_each(free[j], scales[j], lut)
            lost = missed[j - start] = (free[j] - level) / pivots[j]
            free[j + 1 : stop].addcmul_(factor[:, j, j + 1 : stop].T[:, :, None], lost, value=-1)
        ahead = factor[:, start:stop, stop:].mT  # [n, free inputs, block]
        free[stop:].transpose(0, 1).baddbmm_(ahead, missed.transpose(0, 1), alpha=-1)
    return Feedback(*_columns(order, chosen, free))


def descend(
    weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor, start: Feedback, *, steps: int
) -> Feedback:
    """Improve levels by ``steps`` rounds of coordinate descent.

    Args:
        weight, scale, lut, moments: as given to :func:`error_feedback`, which found ``start``.
    """
    order = _order(moments)
    products = torch.stack([damped(one[at][:, at]) for one, at in zip(moments, order, strict=True)])
    pivots = products.diagonal(dim1=1, dim2=2).T[:, :, None]  # [in, n, 1]
    wanted, scales, chosen, moved = _rows(order, weight, scale, *start)
    missed = wanted.clone()
    for i, own in enumerate(lut):
        missed[:, i] -= lookup(own, chosen[:, i]) * scales[:, i]
    for first in list(range(0, len(wanted), BLOCK)) * steps:
        last = min(first + BLOCK, len(wanted))
        # of half the error, by the weights of this block
        slope = torch.stack([h[first:last] @ missed[:, i] for i, h in enumerate(products)], dim=1)
        for j in range(first, last):
            moved[j] = wanted[j] - missed[j] + slope[j - first] / pivots[j]
            chosen[j], level = nearest_of_each(moved[j], scales[j], lut)
            now = wanted[j] - level
            near = products[:, j + 1 : last, j].T[:, :, None]
            slope[j + 1 - first :].addcmul_(near, now - missed[j])
            missed[j] = now
    return Feedback(*_columns(order, chosen, moved))


def output_error(difference: Tensor, moments: Tensor) -> float:
    """tr D H D^T: the mean squared output of a weight D ``[out, in]``, summed over outputs."""
    return float(((difference @ moments) * difference).sum())
