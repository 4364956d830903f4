"""Section of the stage sensitivity."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params.base import Count, Section, Seed


class Sensitivity(Section):
    """How much each layer matters: one score per quantized layer, before any training."""

    method: Literal["fisher", "perturbation", "file"] = "fisher"
    """`fisher`: mean squared gradient of the KD loss; `perturbation`: rise of the held-out KD loss
    when only that layer is quantized (an evaluation per layer); `file`: taken from `file`."""
    file: str | None = None
    """`file` only, must be null otherwise: path of a JSON file with `sensitivity_scores`, one
    number per decoder block, or of another run's scores.json. DVC sees edits of files under
    data/local."""
    batches: Count = 4
    """`fisher` only: batches of training sequences, each with a gradient of its own (fewer, if
    the cache has fewer sequences)."""
    batch_size: Count = 4
    """`fisher` only: sequences per batch."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """`fisher` only: decay of the moving average over the batches, corrected for its start."""
    sequences: Count = 12
    """`perturbation` only: val sequences per evaluation (all, if there are fewer)."""
    seed: Seed = 0
    """`fisher` only: seed of the choice of sequences."""

    @model_validator(mode="after")
    def _file_of_its_method(self) -> Self:
        if self.method == "file" and not self.file:
            raise ValueError(
                "sensitivity.file = null: method file needs the path of a JSON file; set it, or "
                "sensitivity.method to fisher"
            )
        if self.method != "file" and self.file is not None:
            raise ValueError(
                f"sensitivity.file = {self.file}: only method file reads a file, and "
                f"sensitivity.method is {self.method}; set sensitivity.file to null or "
                "sensitivity.method to file"
            )
        return self
