"""Error feedback for the layers of a model, those of one kind side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lib.base.progress import track
from lib.model.linear import LutLinear
from lib.quant.gptq import descend, error_feedback

AT_ONCE = 2**25
"""Entries of weights and moments that are worked on together; a larger layer is by itself. About 30
bytes of memory each."""


def _batches(layers: Mapping[str, LutLinear]) -> Iterator[list[str]]:
    """Names of layers with equal shape, levels and rounds of descent, in the model's order."""
    kinds: dict[tuple[int, ...], list[str]] = {}
    for name, layer in layers.items():
        spec = layer.spec
        kind = (*layer.indices.shape, spec.lut_size, spec.descent_steps)
        kinds.setdefault(kind, []).append(name)
    for (rows, columns, *_), names in kinds.items():
        count = max(1, AT_ONCE // ((rows + columns) * columns))
        yield from (names[i : i + count] for i in range(0, len(names), count))


@torch.no_grad()
def feed_back(layers: Mapping[str, LutLinear], moments: Mapping[str, Tensor] | None) -> None:
    """Choose indices by error feedback, and coordinate descent, where a layer's spec says so, under
    the present scales. The masters take what other inputs missed: where they stay, training would
    jump back to the nearest levels.

    Args:
        moments: E[x x^T] of each layer's inputs, float32 ``[in, in]``.

    Raises:
        ValueError: moments of a layer are missing, or are E[x^2] only.
        MismatchError: a layer is snapped and has no master weight.
    """
    wanted = {name: layer for name, layer in layers.items() if layer.spec.feedback}
    if not wanted:
        return
    batches = list(_batches(wanted))
    for names in track(batches, len(batches), "error feedback, layers side by side"):
        group = [wanted[name] for name in names]
        _feed_back(group, [_products_of(name, moments) for name in names])


def _products_of(name: str, moments: Mapping[str, Tensor] | None) -> Tensor:
    found = None if moments is None else moments[name]
    if found is None or found.dim() != 2:
        raise ValueError(f"{name}: error feedback needs the second moments of its inputs")
    return found


def _feed_back(layers: list[LutLinear], moments: list[Tensor]) -> None:
    masters: list[Tensor] = [layer.master() for layer in layers]
    problem = (
        torch.stack(masters),
        torch.stack([torch.matmul(*layer.factors()) for layer in layers]),
        torch.stack([layer.levels() for layer in layers]),
        torch.stack(moments).to(masters[0].device),
    )
    found = error_feedback(*problem)
    if steps := layers[0].spec.descent_steps:
        found = descend(*problem, found, steps=steps)
    for layer, indices, weight in zip(layers, *found, strict=True):
        layer.indices.copy_(indices)
        layer.master().copy_(weight)
        layer.rebase_weight()  # rounding, and scales of zero
