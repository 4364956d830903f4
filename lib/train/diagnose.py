"""Where a loss stopped being finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.linear import LutLinear
from lib.objective.loss import Batch, Loss
from lib.train.parallel import whole


@torch.no_grad()
def first_bad(
    model: PreTrainedModel,
    loss: Loss,
    batches: Iterable[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
) -> str:
    """Where non-finite values first appear: a parameter, else a module's output.

    Args:
        batches: on the model's device; they are run until one shows it.
        autocast: the precision they ran with.
    """
    for name, parameter in model.named_parameters():
        if not whole(parameter).isfinite().all():
            return f"parameter {name} is not finite"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: object) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if isinstance(values, Tensor) and not values.isfinite().all():
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, LutLinear) or not any(True for _ in module.children())
    ]
    for batch in batches:
        with autocast():
            loss(model, batch)
        if found:
            break
    for handle in handles:
        handle.remove()
    return f"first in the output of {found[0]}" if found else "in the loss itself"
