"""How a device may do matrix products in FP16; the sources disagree, docs/ane.md lists them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

MATMUL_LIMIT = 32752.0
"""Matrix products above about this came out infinite on some devices; sources partly disagree."""

PARTIAL_INPUTS = 64
"""Inputs per partial sum in mode ``partial``, unless told otherwise."""

MATMULS = frozenset({"mm", "bmm", "addmm", "baddbmm", "convolution", "linear", "matmul"})


class Mode(StrEnum):
    """What is assumed of matrix products and convolutions.

    ``wide``: accumulated in float32, rounded once. ``bounded``: the same, but a result above
    32752 is infinite. ``partial``: summed in FP16 over chunks of inputs, every partial sum rounded.
    """

    WIDE = "wide"
    BOUNDED = "bounded"
    PARTIAL = "partial"


def partial_product(
    func: Any, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: int
) -> Tensor:
    """The result of one of :data:`MATMULS`, summed in FP16 over chunks of ``inputs`` inputs.

    A bias is added in FP16 at the end. Grouped convolutions are computed whole.
    """
    if op == "convolution":
        return _partial_convolution(func, args, inputs)
    bias: Tensor | None = None
    if op in ("addmm", "baddbmm"):
        bias, left, right = args[:3]
    elif op == "linear":
        left, right = args[0], args[1].transpose(0, 1)
        bias = args[2] if len(args) > 2 else None
    else:
        left, right = args[:2]
    total: Tensor | None = None
    for start in range(0, left.shape[-1], inputs):
        chunk = slice(start, start + inputs)
        part = torch.matmul(left[..., chunk], right[..., chunk, :]).half()
        total = part if total is None else total + part  # half + half: one rounding
    assert total is not None
    result = total.to(left.dtype) * kwargs.get("alpha", 1)
    return result if bias is None else result + bias * kwargs.get("beta", 1)


def _partial_convolution(func: Any, args: tuple[Any, ...], inputs: int) -> Tensor:
    x, weight, bias, *options = args
    groups = options[-1]
    if groups != 1:  # few inputs each
        return func(*args)
    total: Tensor | None = None
    for start in range(0, x.shape[1], inputs):
        chunk = slice(start, start + inputs)
        part = func(x[:, chunk], weight[:, chunk], None, *options).half()
        total = part if total is None else total + part
    assert total is not None
    result = total.to(x.dtype)
    return result if bias is None else result + bias.view(-1, *[1] * (x.ndim - 2))
