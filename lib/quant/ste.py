"""The quantized weight as one differentiable operation, and FP16 rounding that passes gradients.

    W_q = LUT[idx] * S,   S = A @ B,   idx = nearest(W / S) or given

Gradients (docs/math.md): the weight's is passed straight through (STE); those of A, B and the
LUT are the true gradients of the product with idx held fixed. Nothing of size [out, in] is kept
for backward but idx (uint8): S and LUT[idx] are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lib.quant.codebook import assign, safe_ratio


class _RoundFP16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def round_fp16(x: Tensor) -> Tensor:
    """Round to FP16 and back to float32; the gradient passes unchanged.

    Values beyond 65504 become infinite, as they do on the device: clamping would hide it.
    """
    return _RoundFP16.apply(x)


def lookup(lut: Tensor, indices: Tensor) -> Tensor:
    """``LUT[indices]`` as float32 ``[out, in]``."""
    return lut.index_select(0, indices.flatten().int()).view(indices.shape)


class _DequantizedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        lut: Tensor,
        indices: Tensor | None,
        affine: bool,
    ) -> Tensor:
        scale = a @ b
        if indices is None:
            assert weight is not None
            indices = assign(safe_ratio(weight, scale), lut, affine=affine)
        ctx.save_for_backward(a, b, lut, indices)
        return scale.mul_(lookup(lut, indices))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        a, b, lut, indices = ctx.saved_tensors
        needs_weight, needs_a, needs_b, needs_lut = ctx.needs_input_grad[:4]
        grad_a = grad_b = grad_lut = None
        if needs_a or needs_b:
            grad_scale = grad * lookup(lut, indices)
            grad_a = grad_scale @ b.T if needs_a else None
            grad_b = a.T @ grad_scale if needs_b else None
        if needs_lut:
            # float64 sums (Apple's GPUs have none): a level collects up to millions of terms
            exact = torch.float32 if lut.device.type == "mps" else torch.float64
            grad_levels = (grad * (a @ b)).flatten().to(exact)
            sums = torch.zeros(lut.numel(), dtype=exact, device=lut.device)
            grad_lut = sums.scatter_add_(0, indices.flatten().long(), grad_levels).to(lut.dtype)
        return (grad if needs_weight else None), grad_a, grad_b, grad_lut, None, None


def dequantized_weight(
    a: Tensor,
    b: Tensor,
    lut: Tensor,
    *,
    weight: Tensor | None = None,
    indices: Tensor | None = None,
    affine: bool = False,
) -> Tensor:
    """``LUT[idx] * (A @ B)`` ``[out, in]`` in float32, whatever autocast says.

    Args:
        a: ``[out, r]``; b: ``[r, in]``; lut: ``[n]``.
        weight: float32 master ``[out, in]``; indices are searched for when none are given.
        indices: uint8 ``[out, in]``; given when the weight does not train.
        affine: the LUT is equally spaced.
    """
    if (weight is None) == (indices is None):
        raise ValueError("give either the weight (indices are searched) or the indices")
    with torch.autocast(a.device.type, enabled=False):
        return _DequantizedWeight.apply(weight, a, b, lut, indices, affine)
