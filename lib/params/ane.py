"""Section of the FP16 check."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lib.params.base import Count, Positive, Section, Seed, Share, not_empty


def _modes(value: tuple[str, ...]) -> tuple[str, ...]:
    if "wide" not in value or len(set(value)) != len(value):
        raise ValueError("must have wide, which the others are compared with, and none twice")
    return value


class AneCheck(Section):
    """The FP16 gate of the Apple Neural Engine."""

    sequences: Count = 4
    """Held-out sequences that are run with rounding after every operation."""
    modes: Annotated[
        tuple[Literal["wide", "bounded", "partial"], ...],
        Field(strict=False),
        AfterValidator(not_empty),
        AfterValidator(_modes),
    ] = ("wide", "bounded", "partial")
    """What is assumed of matrix products: `wide` accumulation in FP32, one rounding; `bounded`, the
    same but infinite above 32752; `partial`, summed in FP16 (pessimistic: only warns)."""
    partial_inputs: Count = 64
    """Inputs per partial sum of mode `partial`."""
    partial_tokens: Annotated[int, Field(ge=2)] = 64
    """Tokens of the first sequence that mode `partial` runs on, being several times slower."""
    norm: Literal["prescaled", "plain"] = "prescaled"
    """The norm that is deployed: `prescaled` divides by the largest entry before it squares;
    `plain` squares x, which is infinite above 255.9 and gives zeros without a NaN."""
    remedy: Literal["none", "alpha"] = "none"
    """Against an overflow: `alpha` scales the residual stream by a power of two, which leaves the
    function as it is, checks again and judges that."""
    gate: Literal["fail", "warn"] = "fail"
    """What a broken limit does: stop the pipeline, or only report."""
    max_kl: Positive = 0.05
    """Largest mean KL divergence of the FP16 output from the FP32 one, in nats per token."""
    min_top1: Share = 0.95
    """Smallest share of positions where both predict the same token."""
    seed: Seed = 0
    """Seed of the choice of sequences."""
