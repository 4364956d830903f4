"""Sections of the methods that train one decoder block at a time."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from lib.params.base import Count, CountOrZero, NotNegative, Positive, Section


class Layerwise(Section):
    """`method: layerwise`: each layer by its own MLP's outputs and by the whole model's."""

    local_weight: NotNegative = 0.5
    """Weight of the reconstruction of the full-precision MLP. Default: the reference."""
    global_weight: NotNegative = 0.5
    """Weight of the distillation loss at the end of the model. Default: the reference."""
    tokens: Count = 128
    """Positions per forward pass that the MLP is compared on. Default: the reference."""
    sequences: CountOrZero = 0
    """Training sequences that are used, from the first on; 0 = all."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if self.local_weight == 0 and self.global_weight == 0:
            raise ValueError(
                "layerwise.local_weight and layerwise.global_weight are both 0; set one above 0"
            )
        return self


class Blockwise(Section):
    """`method: blockwise`: each block learns the full-precision block's outputs."""

    epochs: Positive = 2.0
    """Passes over the training sequences per block; 2.5 is two and a half. Default:
    EfficientQAT."""
    adaptive: NotNegative = 0.0
    """Share of further epochs that the most sensitive block of runs/sensitivity gets, the others
    in proportion; 0 = the same for all, documented: 0.25."""
    patience: CountOrZero = 0
    """Epochs in a row without a better held-out loss that end a block; 0 = never."""
    sequences: CountOrZero = 0
    """Training sequences that are used, from the first on; 0 = all."""
    clip: NotNegative = 0.0
    """Largest gradient norm; 0 = no clipping, as in EfficientQAT."""
