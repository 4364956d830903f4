"""FP16 exactness and counts, against the bit patterns of every FP16 value."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.quant.fp16 import (
    FP16_MAX,
    FP16_MAX_SQUARABLE,
    FP16_MIN_NORMAL,
    fp16_facts,
    is_fp16_exact,
    round_to_fp16,
)

ALL_BITS = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE = torch.from_numpy(ALL_BITS[np.isfinite(ALL_BITS)].astype(np.float32))


def test_every_finite_fp16_value_is_exact() -> None:
    assert FINITE.numel() == 2**16 - 2 * 2**10
    assert is_fp16_exact(FINITE)
    assert not is_fp16_exact(torch.nextafter(FINITE, torch.full_like(FINITE, math.inf))[5000:5001])


def test_limits_are_those_of_the_format() -> None:
    assert FINITE.max().item() == FP16_MAX
    assert torch.finfo(torch.float16).smallest_normal == FP16_MIN_NORMAL
    largest = torch.tensor([FP16_MAX_SQUARABLE])
    assert torch.isfinite(round_to_fp16(largest**2)).all()
    assert torch.isinf(round_to_fp16((largest + 0.1) ** 2)).all()


@given(st.floats(width=32, allow_nan=True, allow_infinity=True))
def test_exactness_agrees_with_numpy(value: float) -> None:
    with np.errstate(over="ignore"):
        half = float(np.float16(np.float32(value)))
    expected = math.isfinite(half) and half == value
    assert is_fp16_exact(torch.tensor([value], dtype=torch.float32)) == expected


def test_counts() -> None:
    facts = fp16_facts(
        torch.tensor([0.0, 1.0, 1.0, 0.1, 2.0**-24, 2.0**-15, 7e4, math.inf, math.nan])
    )
    assert facts.entries == 9
    assert facts.inexact == 2  # 0.1 and 70000
    assert facts.non_finite == 2
    assert facts.subnormal == 2
    assert fp16_facts(torch.tensor([0.5, 0.5 + 1e-5])).distinct == 1
    assert fp16_facts(torch.tensor([0.5, 0.5 + 1e-3])).distinct == 2


def test_overflow_is_infinite_and_never_clamped() -> None:
    assert torch.isinf(round_to_fp16(torch.tensor(65520.0)))
    assert round_to_fp16(torch.tensor(65519.0)).item() == FP16_MAX
