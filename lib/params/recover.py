"""Section of the recovery adapters."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params.base import Count, CountOrZero, Positive, Seed
from lib.params.training import LoopConfig


class Recover(LoopConfig):
    """LoRA adapters beside the quantized layers of the snapped model, which stays as it is."""

    steps: CountOrZero = 0
    """Optimizer steps; 0 = no adapters."""
    mode: Literal["kd", "kd_cache", "sft", "text"] = "kd_cache"
    """What adapters learn from. `kd_cache`: the teacher's cached logits; `kd`: the teacher itself,
    run in every step; `text`: the labels of the training text; `sft`: the labels of answers,
    prompts left out. `distill_weight` is for the first two."""
    rank: Count = 8
    """Rank r of an adapter, at most the layer's smaller size. Default: the reference."""
    alpha: Positive = 8.0
    """The adapter is multiplied by alpha / rank. Default: the reference, alpha = rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are left out in a training step. Default: the reference."""
    mlp_only: bool = False
    """Adapters on gate, up and down only."""
    skip_k: bool = True
    """No adapter on the k projection. Default: the reference, which follows Apple's placement."""
    rate: Positive = 2e-4
    """Learning rate of the adapters."""
    seed: Seed = 4
    """Seed of the adapters' start, of dropout and of the order of the data."""

    def rate_of(self, role: str) -> float:
        """Adapters train, nothing else does."""
        return self.rate if role == "adapter" else 0.0

    @model_validator(mode="after")
    def _terms_exist(self) -> Self:
        if self.hard_top1_weight and self.mode != "kd_cache":
            raise ValueError(
                f"hard_top1_weight = {self.hard_top1_weight}: only the cache has candidates, and "
                f"recover.mode is {self.mode}; set it to 0 or the mode to kd_cache"
            )
        if self.hard_full_weight and self.mode in ("sft", "text"):
            raise ValueError(
                f"hard_full_weight = {self.hard_full_weight}: recover.mode {self.mode} asks no "
                "teacher; set it to 0 or the mode to kd_cache or kd"
            )
        return self
