"""The deployed, rank-by-rank form of a quantized layer.

    y = sum_k A[:, k] * (Q @ (B[k, :] * x)),   Q = LUT[idx]

It equals ``F.linear(x, Q * (A @ B))``; no [out, in] scale is ever made.
Shapes: x [N, in], A [out, r], B [r, in], Q [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib.model.linear import LutLinear
from lib.model.surgery import quantized_layers, replace_module
from lib.quant.fp16 import round_to_fp16
from lib.quant.ste import lookup


class FactoredLinear(nn.Module):
    """A :class:`LutLinear` computed rank by rank, all ranks in one matrix product.

    Args:
        layer: the layer whose LUT, indices and factors are used.
        fp16: hold the factors (magnitudes multiplied in) and the bias as the FP16 constants of a
            deployed graph; without it they keep float32 precision.
    """

    def __init__(self, layer: LutLinear, *, fp16: bool) -> None:
        super().__init__()
        hold = round_to_fp16 if fp16 else torch.clone
        with torch.no_grad():
            a, b = layer.factors()
            self.register_buffer("a", hold(a).T.contiguous())  # [r, out]
            self.register_buffer("b", hold(b))  # [r, in]
            self.register_buffer("lut", hold(layer.levels()))
            self.register_buffer("bias", None if layer.bias is None else hold(layer.bias))
        self.register_buffer("indices", layer.indices)

    a: Tensor
    b: Tensor
    lut: Tensor
    bias: Tensor | None
    indices: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        rank, out_features = self.a.shape
        rows = x.reshape(-1, 1, x.shape[-1]) * self.b  # [N, r, in]
        products = rows.flatten(0, 1) @ lookup(self.lut, self.indices).T  # [N * r, out]
        y = (products.view(-1, rank, out_features) * self.a).sum(1)  # [N, out]
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], out_features)


def factorize(model: nn.Module, *, fp16: bool) -> dict[str, LutLinear]:
    """Swap every quantized layer for its rank-by-rank form; returns the originals by name."""
    originals = quantized_layers(model)
    for name, layer in originals.items():
        replace_module(model, name, FactoredLinear(layer, fp16=fp16))
    return originals


def restore(model: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Put modules back where they were: what :func:`factorize` returned, by name."""
    for name, module in originals.items():
        replace_module(model, name, module)
