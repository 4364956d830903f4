"""Section of the stage export."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lib.params.base import Count, Positive, Section, not_empty

Format = Literal["coreml", "coreai", "huggingface", "anemll"]


SINGLE_STEPS = 3
"""Tokens after a prefill, one by one, on which an export is checked."""


class Export(Section):
    """What is made of the snapped model, and how it is checked."""

    formats: Annotated[tuple[Format, ...], Field(strict=False), AfterValidator(not_empty)] = (
        "coreml",
        "huggingface",
        "anemll",
    )
    """`coreml`: an .mlpackage; `coreai`: an .aimodel (needs the extra `coreai`); `huggingface`: a
    dense FP16 folder; `anemll`: a .pt checkpoint of the reference implementation."""
    target: Literal["iOS18", "iOS16"] = "iOS18"
    """Oldest system of the Core ML package: iOS18 keeps the cache as state and has two functions,
    iOS16 takes and gives it, and has one."""
    context: Count = 512
    """Slots of the key/value cache: prompt and answer together, in tokens."""
    prefill_tokens: Count = 64
    """Tokens of the prompt that one call takes."""
    model_id: str | None = None
    """Hub name of the base model, which ANEMLL's own scripts read from the checkpoint's config."""
    max_kl: Positive = 0.01
    """Largest mean KL divergence of an export from the snapped model, in nats per token."""

    @model_validator(mode="after")
    def _room(self) -> Self:
        least = self.prefill_tokens + SINGLE_STEPS
        if self.context < least:
            raise ValueError(
                f"export.context = {self.context}: must be at least {least}, export.prefill_tokens "
                f"and {SINGLE_STEPS} more tokens, on which the package is checked"
            )
        return self
