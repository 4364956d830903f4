"""Indices by error feedback: GPTQ on a LUT with given scales.

    minimize  tr (W - W_q) H (W - W_q)^T,   W_q = LUT[idx] * S,   H = E[x x^T]

over idx, one input after the other: each takes its nearest level, and what that misses is made
good, as far as H allows, by the inputs that are still free. With U the upper Cholesky factor of
the damped H's inverse, quantizing input j moves the free ones by ``-(w_j - q_j) / U_jj * U_j``:
optimal brain surgery without inverting anew for each input (Frantar et al., "GPTQ", 2023, section
3.3). Inputs are taken by falling H_jj: S is known beforehand, so any order will do.

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


def inverse_factor(moments: Tensor) -> Tensor:
    """U ``[in, in]`` float32, upper: ``U^T U`` is the inverse of the damped H."""
    there = moments.device
    # MPS has no float64
    damped = (moments.cpu() if there.type == "mps" else moments).double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float().to(there)


class Feedback(NamedTuple):
    """What error feedback chose, and why."""

    indices: Tensor
    """uint8 ``[out, in]``."""
    weight: Tensor
    """``[out, in]``: each weight as it was when its level was chosen, with what the inputs before
    it had missed. Its nearest level is the chosen one."""


def error_feedback(
    weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor, *, affine: bool
) -> Feedback:
    """Levels ``lut [n]`` for a weight under given scales S.

    Args:
        moments: H, the mean of x x^T over calibration text, float32 ``[in, in]``.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments[order][:, order])
    free = weight.T[order].contiguous()  # [in, out]: an input is a row
    scales = scale.T[order].contiguous()
    chosen = torch.empty(free.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(free), BLOCK):
        stop = min(start + BLOCK, len(free))
        missed = torch.empty_like(free[start:stop])
        for j in range(start, stop):
            chosen[j] = assign(safe_ratio(free[j], scales[j]), lut, affine=affine)
            missed[j - start] = (free[j] - lookup(lut, chosen[j]) * scales[j]) / factor[j, j]
            free[j + 1 : stop] -= factor[j, j + 1 : stop, None] * missed[j - start]
        free[stop:] -= factor[start:stop, stop:].T @ missed
    indices, moved = torch.empty_like(chosen), torch.empty_like(free)
    indices[order], moved[order] = chosen, free
    return Feedback(indices.T.contiguous(), moved.T.contiguous())


def output_error(difference: Tensor, moments: Tensor) -> float:
    """tr D H D^T: the mean squared output of a weight D ``[out, in]``, summed over outputs."""
    return float(((difference @ moments) * difference).sum())
