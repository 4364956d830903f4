"""FP16 arithmetic as a float32 run that rounds after every operation, with a log per layer.

    with Fp16Emulation(model, mode=Mode.WIDE) as emulation:
        logits = model(input_ids).logits

Each floating result is rounded to the nearest FP16 value before anything else can read it: that is
float32 accumulation with one rounding per operation, what FP16 hardware with a wide accumulator
does. A result beyond 65504 becomes infinite, as on the device; nothing is clamped.

Modules that hold an ``inv_freq`` buffer (rotary position tables) run unrounded and only their
results are rounded: a deployed graph has those tables as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib.ane.graph import SOFTMAXES, GraphLog
from lib.ane.products import MATMUL_LIMIT, MATMULS, PARTIAL_INPUTS, Mode, partial_product
from lib.quant.fp16 import round_to_fp16

FIRST_OVERFLOW = 65520.0
"""Smallest magnitude that rounds to infinity (halfway between 65504 and 65536)."""

MOVES = frozenset({"clone", "index_select", "cat", "_unsafe_view"})
"""Operations that only move values which were rounded when they were made."""


@dataclass
class OpRecord:
    """What one kind of operation did inside one module.

    Attributes:
        module: dotted name of the innermost module running ("" is the model itself).
        op: operation, e.g. ``mm``.
        max_abs: largest finite magnitude before rounding.
        overflows: runs whose finite result passed the limit of the mode and so became infinite.
    """

    module: str
    op: str
    max_abs: float = 0.0
    overflows: int = 0

    @property
    def is_matmul(self) -> bool:
        return self.op in MATMULS

    def add(self, peak: float, mode: Mode) -> bool:
        """Take in the largest finite magnitude of one result; whether that becomes infinite."""
        self.max_abs = max(self.max_abs, peak)
        bounded = mode is Mode.BOUNDED and self.is_matmul
        over = peak >= FIRST_OVERFLOW or (bounded and peak > MATMUL_LIMIT)
        self.overflows += over
        return over


class Fp16Emulation(TorchDispatchMode):
    """Round every floating result to FP16 and log magnitudes by module and operation.

    Args:
        model: its modules are tracked by hooks while the context is open; not changed.
        constants: tensors (an attention mask) whose size is a choice of the caller; a result
            that takes one in directly is rounded, but its magnitude is not logged.
        mode: how the device is taken to do matrix products.
        partial_inputs: inputs per partial sum; used by mode ``partial`` only.
        inputs_of: modules whose largest |input| is kept in ``input_peaks``.
    """

    def __init__(
        self,
        model: nn.Module,
        constants: Iterable[Tensor] = (),
        *,
        mode: Mode = Mode.WIDE,
        partial_inputs: int = PARTIAL_INPUTS,
        inputs_of: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.records: dict[tuple[str, str], OpRecord] = {}
        self.non_finite_from: str | None = None  # module of the first NaN or infinity
        self.input_peaks: dict[str, float] = {}
        self.graph = GraphLog()
        self._model = model
        self._mode = mode
        self._partial_inputs = partial_inputs
        self._inputs_of = inputs_of
        self._constants = {tensor.untyped_storage().data_ptr() for tensor in constants}
        self._modules = [""]
        self._paused = 0
        self._overflowed = False
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
            self._paused += 1
            if name in self._inputs_of:
                known = self.input_peaks.get(name, 0.0)
                self.input_peaks[name] = max(known, largest_magnitude(inputs[0]))
            self._paused += is_table - 1

        return hook

    def _leaving(self, is_table: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            self._modules.pop()
            self._paused -= is_table
            return _round_results(output) if is_table else output

        return hook

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        op = func._schema.name.split("::")[1]
        if self._paused:
            return func(*args, **(kwargs or {}))
        result: Any
        if self._mode is Mode.PARTIAL and op in MATMULS:
            result = partial_product(func, op, args, kwargs or {}, self._partial_inputs)
        else:
            result = func(*args, **(kwargs or {}))
        self.graph.see(self._modules[-1], func, op, args, result)
        if op in SOFTMAXES and not self._overflowed:  # else it is no fault of the mask
            self.graph.see_softmax(args[0])
        if func.is_view or op in MOVES:
            return result
        watched = not any(self._is_constant(value) for value in args)
        if not watched and isinstance(args[0], Tensor):
            self.graph.see_masked(args[0])
        for value in result if isinstance(result, tuple | list) else (result,):
            self._settle(value, op, watched)
        return result

    def _is_constant(self, value: Any) -> bool:
        return (
            bool(self._constants)
            and isinstance(value, Tensor)
            and value.untyped_storage().data_ptr() in self._constants
        )

    def _settle(self, value: Any, op: str, watched: bool) -> None:
        """Log one result and round it in place, which saves the memory of a second tensor and
        serves operations in place too; anything but a floating tensor passes."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return
        if watched:
            self._log(value, op)
        if self._mode is Mode.BOUNDED and op in MATMULS:
            value.copy_(torch.where(value.abs() > MATMUL_LIMIT, value * math.inf, value))
        value.copy_(value.half())

    def _log(self, value: Tensor, op: str) -> None:
        module = self._modules[-1]
        low, high = (float(end) for end in torch.aminmax(value))
        peak = max(abs(low), abs(high))
        if not math.isfinite(low) or not math.isfinite(high):
            finite = value[torch.isfinite(value)]
            peak = float(finite.abs().max()) if finite.numel() else 0.0
            self.non_finite_from = self.non_finite_from or module
        record = self.records.setdefault((module, op), OpRecord(module, op))
        if record.add(peak, self._mode):
            self._overflowed = True
            self.non_finite_from = self.non_finite_from or module


def largest_magnitude(values: Tensor) -> float:
    """max|x|; infinite where an entry is NaN or infinite."""
    largest = float(values.abs().max())
    return largest if math.isfinite(largest) else math.inf


def _round_results(output: Any) -> Any:
    if isinstance(output, Tensor):
        return round_to_fp16(output) if output.is_floating_point() else output
    return type(output)(_round_results(part) for part in output)
