"""RMSNorm as it is deployed in FP16: prescaled by the largest entry.

    m = max(max|x|, sqrt(eps)),  u = x / m
    y = w * u / sqrt(mean(u^2) + (sqrt(eps) / m)^2)

Algebraically this is the plain norm for any m > 0. With a plain norm, x^2 is infinite in FP16 as
soon as |x| passes 255.9, and the layer silently returns zeros: every value stays finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lib.model.surgery import replace_module


class PrescaledRMSNorm(nn.Module):
    """See the module's equation; ``peak`` is the largest |input| seen so far."""

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain, requires_grad=False)
        self.root_eps = math.sqrt(eps)
        self.peak = 0.0

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        self.peak = max(self.peak, float(largest.max()))
        largest = largest.clamp_min(self.root_eps)
        scaled = x / largest
        variance = (scaled * scaled).mean(-1, keepdim=True) + (self.root_eps / largest) ** 2
        return scaled * torch.rsqrt(variance) * self.gain


def _rms_gain(module: nn.Module) -> tuple[Tensor, float] | None:
    """(gain w, eps) if ``module`` behaves as an RMSNorm, else None.

    Told by behaviour on a probe, not by class name: families differ in the name and in whether
    the stored weight is w or w - 1 (Gemma).
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, weight.numel(), generator=generator).to(weight)
    unit = probe * torch.rsqrt(probe.pow(2).mean(-1, keepdim=True) + eps)
    result = module(probe)
    for gain in (weight.detach(), 1 + weight.detach()):
        if torch.allclose(result, unit * gain, rtol=1e-4, atol=1e-5):
            return gain.clone(), eps
    return None


@torch.no_grad()
def prescale_norms(model: nn.Module) -> dict[str, PrescaledRMSNorm]:
    """Replace every RMSNorm by its prescaled form, in place; returns the new ones by name."""
    replaced = {}
    for name, module in list(model.named_modules()):
        found = _rms_gain(module)
        if found is not None:
            replaced[name] = PrescaledRMSNorm(*found)
            replace_module(model, name, replaced[name])
    return replaced
