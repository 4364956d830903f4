"""Fisher scores: how large the gradient of the KD loss is, squared, at each quantized layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError
from lib.base.progress import track
from lib.model.surgery import quantized_layers
from lib.objective.loss import Batch, Batches, Loss
from lib.quant.average import moved_average


def drawn_rows(total: int, batches: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """Cache rows of each batch, none twice; fewer, and a last one that may be smaller, where the
    cache has only ``total`` rows."""
    order = np.random.default_rng(seed).permutation(total)[: batches * batch_size]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def smoothed(values: Iterable[dict[str, float]], beta: float) -> dict[str, float]:
    """Exponential moving average of the values of each name, corrected for its start at 0.

        e_0 = 0,  e_t = beta e_(t-1) + (1 - beta) m_t,  result = e_T / (1 - beta^T)

    So one batch gives its own value, and the weights of several sum to 1.
    """
    average: dict[str, float] = {}
    left = 1.0  # weight that the start at 0 still has, beta^t
    for now in values:
        left *= beta
        for name, value in now.items():
            average[name] = moved_average(average.get(name, 0.0), value, beta)
    return {name: value / (1 - left) for name, value in average.items()}


@contextlib.contextmanager
def _squaring(model: PreTrainedModel, found: dict[str, Tensor], where: str) -> Iterator[None]:
    """While this holds, a backward pass leaves the mean squared gradient of every master weight in
    ``found``, in the order it reaches them, and no gradient; a forward pass checks the outputs."""
    layers = quantized_layers(model)

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            found[name] = weight.grad.float().square().mean()
            weight.grad = None  # one layer's gradient in memory, not the model's

        return hook

    def check(name: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            if not output.isfinite().all():
                raise NonFiniteError(
                    f"sensitivity: the output of {name} is not finite in {where}; check the "
                    "teacher's weights and the section quant"
                )

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            assert layer.weight is not None  # just quantized, so it has its master
            layer.weight.requires_grad_(True)
            handles.append(layer.weight.register_post_accumulate_grad_hook(keep(name)))
            handles.append(layer.register_forward_hook(check(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            if layer.weight is not None:
                layer.weight.requires_grad_(False)
                layer.weight.grad = None


def mean_squares(
    model: PreTrainedModel, objective: Loss, batch: Batch, where: str = "the batch"
) -> dict[str, float]:
    """Mean over its entries of the squared gradient of each layer's W_q, in the model's order.

    The gradient is that of the mean KD loss over the batch's positions, and is read off the master
    weights, to which the straight-through estimator passes it unchanged.

    Args:
        where: what the batch is called in an error.

    Raises:
        NonFiniteError: a layer's output, the loss, or a gradient is not finite.
    """
    found: dict[str, Tensor] = {}
    with _squaring(model, found, where):
        sums = objective(model, batch)
        loss = sums.total / sums.count.clamp_min(1)
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteError(
                f"sensitivity: the loss is {float(loss.detach())} in {where}, behind the last "
                "quantized layer; check distill.temperature and the teacher's weights"
            )
        loss.backward()
    values = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    for name, value in values.items():  # as the gradient passed them: the first bad one is named
        if not math.isfinite(value):
            raise NonFiniteError(
                f"sensitivity: the squared gradient of {name} is {value} in {where}; check the "
                "teacher's weights and the section quant"
            )
    return {name: values[name] for name in quantized_layers(model)}


def fisher_scores(
    model: PreTrainedModel,
    objective: Loss,
    cache: Batches,
    batches: list[np.ndarray],
    beta: float,
    device: torch.device,
) -> dict[str, float]:
    """Fisher score of every quantized layer of ``model``, which stays as it is.

    Args:
        batches: rows of the cache, batch by batch (:func:`drawn_rows`).
        beta: decay of the moving average over the batches (:func:`smoothed`).

    Raises:
        NonFiniteError: see :func:`mean_squares`.
    """

    def values() -> Iterator[dict[str, float]]:
        for number, rows in enumerate(track(batches, len(batches), "gradient batches"), start=1):
            where = f"batch {number} of {len(batches)}"
            yield mean_squares(model, objective, cache.batch(rows).to(device), where)

    return smoothed(values(), beta)
