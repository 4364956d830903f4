"""What a check is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lib.ane.norms import NormForm
from lib.ane.products import PARTIAL_INPUTS, Mode


class Remedy(StrEnum):
    """What is done about an overflow before the verdict: nothing, or a smaller residual stream."""

    NONE = "none"
    ALPHA = "alpha"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a form may lose against float32: mean KL in nats, least share of equal top-1."""

    max_kl: float
    min_top1: float


@dataclass(frozen=True, kw_only=True)
class CheckSpec:
    """What is deployed and how it is emulated.

    Attributes:
        modes: assumptions about matrix products, ``wide`` among them.
        partial_inputs: inputs per partial sum of mode ``partial``.
        partial_tokens: tokens of the first sequence that mode ``partial`` is run on.
    """

    limits: Limits
    modes: tuple[Mode, ...] = tuple(Mode)
    norm: NormForm = NormForm.PRESCALED
    remedy: Remedy = Remedy.NONE
    partial_inputs: int = PARTIAL_INPUTS
    partial_tokens: int = 64
