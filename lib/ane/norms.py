"""RMSNorm as it is deployed in FP16: plain, or prescaled by the largest entry.

    plain       y = w * x / sqrt(mean(x^2) + eps)

    prescaled   m = max(max|x|, sqrt(eps)),  u = x / m
                y = w * u / sqrt(mean(u^2) + (sqrt(eps) / m)^2)

Algebraically the second is the first for any m > 0. With the plain form x^2 is infinite in FP16 as
soon as |x| passes 255.9, and the layer silently returns zeros: every value stays finite.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor, nn

from lib.model.norms import rms_gain
from lib.model.surgery import replace_module
from lib.quant.fp16 import round_to_fp16

SQUARE = "pow"
"""The operation of :class:`PlainRMSNorm` that squares."""


class NormForm(StrEnum):
    """How RMSNorms are deployed; see the module's equations."""

    PRESCALED = "prescaled"
    PLAIN = "plain"


class PrescaledRMSNorm(nn.Module):
    """Divides by the largest entry before it squares."""

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain, requires_grad=False)
        self.root_eps = math.sqrt(eps)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the gain's size at its end; the same shape."""
        largest = x.abs().amax(-1, keepdim=True).clamp_min(self.root_eps)
        scaled = x / largest
        variance = (scaled * scaled).mean(-1, keepdim=True) + (self.root_eps / largest) ** 2
        return scaled * torch.rsqrt(variance) * self.gain


class PlainRMSNorm(nn.Module):
    """Squares its input; eps is the FP16 constant that a graph holds."""

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain, requires_grad=False)
        self.eps = float(round_to_fp16(torch.tensor(eps)))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the gain's size at its end; the same shape."""
        variance = x.pow(2).mean(-1, keepdim=True) + self.eps
        return x * torch.rsqrt(variance) * self.gain


_FORMS: dict[NormForm, type[PrescaledRMSNorm] | type[PlainRMSNorm]] = {
    NormForm.PRESCALED: PrescaledRMSNorm,
    NormForm.PLAIN: PlainRMSNorm,
}


@torch.no_grad()
def deploy_norms(model: nn.Module, form: NormForm) -> dict[str, nn.Module]:
    """Replace every RMSNorm by its deployed form, in place; returns the originals by name."""
    originals = {}
    for name, module in list(model.named_modules()):
        found = rms_gain(module)
        if found is not None:
            originals[name] = module
            replace_module(model, name, _FORMS[form](*found))
    return originals
