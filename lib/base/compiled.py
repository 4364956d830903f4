"""Functions compiled by torch where that pays, and as they stand where it does not or cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for any shape; as it stands from the first failed attempt on."""
    compiled = torch.compile(function, dynamic=True)
    works = True

    def call(*args: Any) -> Any:
        nonlocal works
        if works:
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                works = False
                reason = str(error).strip().splitlines()[0]
                print(f"not compiling {function.__name__} ({reason}); slower", file=sys.stderr)
        return function(*args)

    return call


def fused(function: Callable[..., Any], first: Tensor, *rest: Any, worth: int) -> Any:
    """``function(first, *rest)`` in one pass over memory where ``first`` has at least ``worth``
    entries. Compiling takes seconds, once per machine; without a compiler the result is the same.
    """
    pays = first.numel() >= worth and first.device.type in ("cpu", "cuda")
    return (_compiled(function) if pays else function)(first, *rest)
