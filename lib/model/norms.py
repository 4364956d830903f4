"""Which modules are RMSNorms, with which gain and eps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS_NAMES = ("variance_epsilon", "eps")
"""Attributes under which norms keep their eps."""


@torch.no_grad()
def rms_gain(module: nn.Module) -> tuple[Tensor, float] | None:
    """(gain w, a copy; eps) if ``module`` computes ``w * x / sqrt(mean(x^2) + eps)``, else None.

    Told by behaviour on a probe, not by class name: families differ in the name and in whether
    the stored weight is w or w - 1 (Gemma).
    """
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in EPS_NAMES if hasattr(module, name)), None)
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
