"""Perturbation scores: what the loss rises by when one layer alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable

from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError
from lib.base.progress import track
from lib.model.linear import LutLinear
from lib.model.surgery import projections, replace_module


def perturbation_scores(
    model: PreTrainedModel,
    layers: dict[str, LutLinear],
    measure: Callable[[PreTrainedModel], float],
) -> dict[str, float]:
    """Per layer: ``measure`` with only that layer quantized, minus ``measure`` of the model.

    Args:
        model: at full precision; it is as it was afterwards.
        layers: the quantized form of its layers, by name, in the order of the result.
        measure: the held-out KD loss, say.

    Raises:
        NonFiniteError: a loss is not finite; the layer is named.
    """

    def finite_loss(what: str) -> float:
        loss = measure(model)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"sensitivity: the held-out loss is {loss} with {what} quantized; check the "
                "teacher's weights and the section quant"
            )
        return loss

    full = finite_loss("nothing")
    whole = projections(model)
    scores = {}
    for name, layer in track(layers.items(), len(layers), "measuring layers"):
        replace_module(model, name, layer)
        try:
            scores[name] = finite_loss(f"only {name}") - full
        finally:
            replace_module(model, name, whole[name])
    return scores
