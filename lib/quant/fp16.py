"""What half precision (FP16, IEEE binary16) can hold, asked of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FP16_MAX = 65504.0
"""Largest finite FP16 value; on the device anything that rounds above it is infinite."""

FP16_MIN_NORMAL = 2.0**-14
"""Smallest normal FP16 value; below it precision is lost, or the value is flushed to zero."""

FP16_MAX_SQUARABLE = math.sqrt(FP16_MAX)
"""Largest value (255.9) whose square is finite: the input limit of a plain x^2 RMSNorm."""

MASK_VALUE = -1e4
"""Added to attention scores of hidden positions: finite in FP16, and exp() of it is zero."""


def round_to_fp16(values: torch.Tensor) -> torch.Tensor:
    """Nearest FP16 value of every entry, in the tensor's own dtype; overflow gives infinity."""
    return values.to(torch.float16).to(values.dtype)


def is_fp16_exact(values: torch.Tensor) -> bool:
    """True when every entry is finite and survives a round trip through FP16 unchanged."""
    rounded = round_to_fp16(values)
    return bool((torch.isfinite(rounded) & (rounded == values)).all())


@dataclass(frozen=True, kw_only=True)
class Fp16Facts:
    """Counts over one tensor.

    Attributes:
        entries: number of entries.
        inexact: finite entries that FP16 cannot hold exactly (overflow included).
        non_finite: NaN or infinite entries.
        subnormal: entries that are subnormal after rounding to FP16 (zero is not).
        distinct: number of different FP16 values.
    """

    entries: int
    inexact: int
    non_finite: int
    subnormal: int
    distinct: int


def fp16_facts(values: torch.Tensor) -> Fp16Facts:
    """Count what FP16 would do to ``values`` (any shape, any floating dtype)."""
    values = values.detach().float()
    rounded = round_to_fp16(values)
    finite = torch.isfinite(values)
    magnitude = rounded.abs()
    return Fp16Facts(
        entries=values.numel(),
        inexact=int((finite & (rounded != values)).sum()),
        non_finite=int((~finite).sum()),
        subnormal=int(((magnitude > 0) & (magnitude < FP16_MIN_NORMAL)).sum()),
        distinct=int(torch.unique(rounded).numel()),
    )
