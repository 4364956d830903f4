"""Section of the proximal regularizer, and what it goes together with."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params.base import NotNegative, Positive, Section
from lib.params.data import Run
from lib.params.training import Quant, Weights


class Prox(Section):
    """`weights.regularizer: prox`: float weights are pulled to their grid while they train
    (ProxQuant). `atol` counts for runs/weights/grid.json in any case."""

    select: Literal["all_linear", "mlp", "attention"] = "all_linear"
    """Quantized layers that train as floats and are pulled; the others train as without it."""
    control: Literal["gamma", "dual"] = "gamma"
    """Where the coefficient comes from: `gamma`, a course; `dual`, a PI controller that seeks
    `beta`."""
    schedule: Literal["linear", "cosine", "exponential"] = "linear"
    """`gamma` only: the course. Default: ProxQuant."""
    gamma_start: NotNegative = 0.0
    """`gamma` only: coefficient of the first step; `exponential` needs it above 0. A weight loses
    gamma / (1 + gamma) of its distance per step at the full learning rate."""
    gamma_end: NotNegative = 0.1
    """`gamma` only: coefficient of the last step."""
    beta: Positive = 0.005
    """`dual` only: mean squared distance to reach, in squared steps between levels; 1/12 is that of
    weights that know nothing of the grid."""
    k_i: Positive = 2e-4
    """`dual` only: integral gain, per step."""
    k_p: NotNegative = 0.02
    """`dual` only: proportional gain."""
    lambda_max: Positive = 1.0
    """`dual` only: largest coefficient."""
    fisher: bool = False
    """Pull each layer in proportion to its running Fisher score, on average by the coefficient."""
    fisher_beta: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """`fisher` only: decay of the moving average over steps."""
    atol: Positive = 0.05
    """Distance up to which a weight counts as on the grid, in steps between levels."""
    hard: Literal["full", "selective"] = "full"
    """What is put on the grid to be evaluated and kept: all weights, or (`selective`) those within
    `atol`, which are stored there, and judged beside the whole."""

    @model_validator(mode="after")
    def _course_has_its_ends(self) -> Self:
        ends = (self.gamma_start, self.gamma_end)
        if self.control == "gamma" and self.schedule == "exponential" and 0 in ends:
            raise ValueError(
                f"prox.gamma_start = {self.gamma_start} and prox.gamma_end = {self.gamma_end}: "
                "schedule exponential multiplies its way and cannot pass 0; set both above 0, or "
                "prox.schedule to linear"
            )
        return self


def check_prox(weights: Weights, prox: Prox, quant: Quant, run: Run) -> None:
    """Rules between `prox` and what it regularizes.

    Raises:
        ValueError: the regularizer is on and does not go with another setting.
    """
    if weights.regularizer == "none":
        return
    remedy = "or weights.regularizer to none"
    if weights.method != "e2e":
        raise ValueError(
            f"weights.method = {weights.method}: the regularizer prox trains the whole model; "
            f"set it to e2e, {remedy}"
        )
    for key in ("scale_direction", "scale_magnitude", "lut"):
        if rate := getattr(weights.rates, key):
            raise ValueError(
                f"weights.rates.{key} = {rate}: the forward pass of the regularizer prox sees "
                f"floats, which have no gradient for it; set it to 0, {remedy}"
            )
    if prox.select == "attention" and (weights.train_mlp_only or not quant.attention):
        why = "is not quantized" if not quant.attention else "does not train"
        raise ValueError(
            f"prox.select = attention: attention {why}; set it to mlp or all_linear, {remedy}"
        )
    if run.shard:
        raise ValueError(
            f"run.shard = true: the regularizer prox needs whole layers; set it to false, {remedy}"
        )
