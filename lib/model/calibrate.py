"""How much each input of each projection is used, E[x^2] over calibration text, and quantization
that is weighted by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError
from lib.base.progress import track
from lib.model.surgery import projections, quantize_model
from lib.quant.spec import ModelSpec

BATCH = 8  # sequences at a time


@torch.no_grad()
def input_importance(
    model: PreTrainedModel, input_ids: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Mean squared input per projection, ``{layer name: [in]}``, float32 on the CPU.

    Args:
        input_ids: long ``[N, L]``, right-padded; lengths: ``[N]`` real tokens of each. Sums run
            in float64 and in a fixed order.

    Raises:
        NonFiniteError: an activation is not finite; the layer is named.
    """
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]  # [N, L]
    now = slice(0, BATCH)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().float()[real[now].to(device)]  # [tokens, in]
            total = x.square().sum(dim=0).cpu().double()
            sums[name] = sums[name] + total if name in sums else total

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name)) for name, module in projections(model).items()
    ]
    try:
        starts = range(0, len(input_ids), BATCH)
        for start in track(starts, len(starts), "calibration batches"):
            now = slice(start, start + BATCH)
            model.base_model(input_ids=input_ids[now].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        if not total.isfinite().all():
            raise NonFiniteError(f"an input of {name} is not finite during calibration")
    return {name: (total / int(real.sum())).float() for name, total in sums.items()}


Sequences = Callable[[int], tuple[Tensor, Tensor]]
"""The first so many sequences of some text: ids ``[N, L]`` and lengths ``[N]``."""


def quantize_calibrated(model: PreTrainedModel, spec: ModelSpec, sequences: Sequences) -> None:
    """Quantize a model in place, refits weighted by its activations if the spec asks for them.

    Args:
        sequences: asked for ``spec.calibration_sequences``, unless that is 0.

    Raises:
        NonFiniteError: see :func:`input_importance`.
        InputError, ParamsError: see :func:`lib.model.surgery.quantize_model`.
    """
    importance = None
    if spec.calibration_sequences:
        importance = input_importance(model, *sequences(spec.calibration_sequences))
    quantize_model(model, spec, importance)
