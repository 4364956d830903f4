"""FP16 arithmetic as a float32 run that rounds after every operation, with a log per layer.

    with Fp16Emulation(model) as emulation:
        logits = model(input_ids).logits

Each floating result is rounded to the nearest FP16 value before anything else can read it: that is
float32 accumulation with one rounding per operation, what FP16 hardware with a wide accumulator
does. A result beyond 65504 becomes infinite, as on the device; nothing is clamped.

Modules that hold an ``inv_freq`` buffer (rotary position tables) run unrounded and only their
results are rounded: a deployed graph has those tables as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib.quant.fp16 import round_to_fp16

FIRST_OVERFLOW = 65520.0
"""Smallest magnitude that rounds to infinity (halfway between 65504 and 65536)."""

MATMUL_LIMIT = 32752.0
"""Matrix products above about this came out infinite on some devices; sources partly disagree."""

MATMULS = frozenset({"mm", "bmm", "addmm", "baddbmm", "convolution", "linear", "matmul"})
MOVES = frozenset({"clone", "index_select", "cat"})
"""Operations that only move values which were rounded when they were made."""


@dataclass
class OpRecord:
    """What one kind of operation did inside one module.

    Attributes:
        module: dotted name of the innermost module running ("" is the model itself).
        op: operation, e.g. ``mm``.
        max_abs: largest finite magnitude before rounding.
        overflows: runs whose finite result passed 65504 and so became infinite.
    """

    module: str
    op: str
    max_abs: float = 0.0
    overflows: int = 0

    @property
    def is_matmul(self) -> bool:
        return self.op in MATMULS


class Fp16Emulation(TorchDispatchMode):
    """Round every floating result to FP16 and log magnitudes by module and operation.

    Args:
        model: its modules are tracked by hooks while the context is open; not changed.
        constants: tensors (an attention mask) whose size is a choice of the caller; a result
            that takes one in directly is rounded, but its magnitude is not logged.
    """

    def __init__(self, model: nn.Module, constants: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.records: dict[tuple[str, str], OpRecord] = {}
        self.non_finite_from: str | None = None  # module of the first NaN or infinity
        self._model = model
        self._constants = {tensor.untyped_storage().data_ptr() for tensor in constants}
        self._modules = [""]
        self._unrounded = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            is_table = hasattr(module, "inv_freq")
            self._handles.append(module.register_forward_pre_hook(self._entering(name, is_table)))
            self._handles.append(
                module.register_forward_hook(self._leaving(is_table), always_call=True)
            )
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _entering(self, name: str, is_table: bool) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._modules.append(name)
            self._unrounded += is_table

        return hook

    def _leaving(self, is_table: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            self._modules.pop()
            self._unrounded -= is_table
            return _round_results(output) if is_table else output

        return hook

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func._schema.name.split("::")[1]
        if self._unrounded or func.is_view or op in MOVES:
            return result
        watched = not any(self._is_constant(value) for value in args)
        tensors = result if isinstance(result, tuple | list) else (result,)
        rounded = [self._settle(value, op, watched) for value in tensors]
        if func._schema.is_mutable:
            # In place: the caller holds the tensor itself, so the rounding goes into it.
            for value, new in zip(tensors, rounded, strict=True):
                if new is not value:
                    value.copy_(new)
            return result
        return type(result)(rounded) if isinstance(result, tuple | list) else rounded[0]

    def _is_constant(self, value: Any) -> bool:
        return (
            bool(self._constants)
            and isinstance(value, Tensor)
            and value.untyped_storage().data_ptr() in self._constants
        )

    def _settle(self, value: Any, op: str, watched: bool) -> Any:
        """Log one result and return it rounded; anything but a floating tensor passes."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return value
        if watched:
            self._log(value, op)
        return round_to_fp16(value)

    def _log(self, value: Tensor, op: str) -> None:
        module = self._modules[-1]
        low, high = (float(end) for end in torch.aminmax(value))
        peak = max(abs(low), abs(high))
        if not math.isfinite(low) or not math.isfinite(high):
            finite = value[torch.isfinite(value)]
            peak = float(finite.abs().max()) if finite.numel() else 0.0
            self.non_finite_from = self.non_finite_from or module
        record = self.records.setdefault((module, op), OpRecord(module, op))
        record.max_abs = max(record.max_abs, peak)
        if peak >= FIRST_OVERFLOW:
            record.overflows += 1
            self.non_finite_from = self.non_finite_from or module


def _round_results(output: Any) -> Any:
    if isinstance(output, Tensor):
        return round_to_fp16(output) if output.is_floating_point() else output
    return type(output)(_round_results(part) for part in output)


@torch.no_grad()
def round_parameters(model: nn.Module) -> None:
    """Round every floating parameter to FP16, in place: what a deployed graph stores."""
    for parameter in model.parameters():
        parameter.copy_(round_to_fp16(parameter))
