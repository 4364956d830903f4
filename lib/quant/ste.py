"""The product with a quantized weight as one differentiable operation, and FP16 rounding that
passes gradients.

    y = x W_q^T + bias,   W_q = LUT[idx] * S,   S = A @ B,   idx = nearest(W / S) or given

Gradients (docs/math.md): the weight's is passed straight through (STE); those of A, B and the
LUT are the true gradients of the product with idx held fixed. Nothing of size [out, in] is kept
for backward but idx (uint8): S and W_q are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.quant.kernels import level_sums, quantized, scaled_levels


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


@torch.no_grad()
def dequantized_weight(a: Tensor, b: Tensor, lut: Tensor, indices: Tensor) -> Tensor:
    """``LUT[idx] * (A @ B)`` ``[out, in]`` in float32, whatever autocast says.

    Args:
        a: ``[out, r]``; b: ``[r, in]``; lut: ``[n]``; indices: uint8 ``[out, in]``.
    """
    with torch.autocast(a.device.type, enabled=False):
        return scaled_levels(a @ b, indices, lut, often=False)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        lut: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        affine: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scale = a @ b
            if weight is None:
                w_q = scaled_levels(scale, indices, lut, affine=affine)
            else:
                w_q, found = quantized(weight, scale, lut, affine=affine)
                indices.copy_(found)
            x_cast = x.to(dtype)
            ctx.save_for_backward(x_cast, a, b, lut, indices)
            ctx.dtype, ctx.affine = x.dtype, affine
            return F.linear(x_cast, w_q.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, lut, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_a, needs_b, needs_lut = ctx.needs_input_grad[:5]
        needs_bias = ctx.needs_input_grad[6]
        grad_y = grads[0]
        rows = grad_y.flatten(0, -2)  # [N, out]
        grad_x = grad_weight = grad_a = grad_b = grad_lut = None
        with torch.autocast(x.device.type, enabled=False):
            scale = a @ b
            if needs_x:
                w_q = scaled_levels(scale, indices, lut, affine=ctx.affine)
                grad_x = (grad_y @ w_q.to(grad_y.dtype)).to(ctx.dtype)
                del w_q
            if needs_weight or needs_a or needs_b or needs_lut:
                grad_w = (rows.T @ x.flatten(0, -2)).to(a.dtype)  # of W_q, [out, in]
                grad_weight = grad_w if needs_weight else None
                if needs_a or needs_b:
                    grad_scale = scaled_levels(grad_w, indices, lut, affine=ctx.affine)
                    grad_a = grad_scale @ b.T if needs_a else None
                    grad_b = a.T @ grad_scale if needs_b else None
                if needs_lut:
                    grad_lut = level_sums(grad_w * scale, indices, lut.numel())
        grad_bias = rows.sum(dim=0).to(a.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_a, grad_b, grad_lut, None, grad_bias, None, None


def quantized_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lut: Tensor,
    *,
    indices: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    affine: bool = False,
) -> Tensor:
    """``x W_q^T + bias``, ``[..., in]`` -> ``[..., out]``.

    W_q is float32 to its last bit; only the product itself follows autocast.

    Args:
        a: ``[out, r]``; b: ``[r, in]``; lut: ``[n]``, all float32.
        indices: uint8 ``[out, in]``. With a weight, the nearest ones are written into it, and it
            has to stay as it is until backward.
        weight: float32 master ``[out, in]`` if it trains.
        affine: the LUT is equally spaced, :func:`lib.quant.kernels.is_computable`.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _QuantizedLinear.apply(x, weight, a, b, lut, indices, bias, affine, dtype)
