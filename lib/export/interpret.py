"""Computing a Core ML program in float32 with PyTorch, written from the operations' definitions.

Independent of coremltools: what the package says is run operation by operation on its own stored
FP16 constants. Nothing is rounded, so that a result differs from the graph's own only by summation
order, and any other difference is a fault of the export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.base.errors import InputError
from lib.export.package import Array, Function, Name, Operation, unpack_bits

Values = dict[str, Any]
"""Inputs of an operation by name: tensors, strings, or lists of them."""


def constant_weight(operation: Operation) -> tuple[Array, Array] | None:
    """(indices in the weight's shape, LUT ``[n]``) of a ``constexpr_lut_to_dense`` with one LUT.

    None for any other operation, and for one with several LUTs.
    """
    if operation.kind != "constexpr_lut_to_dense":
        return None
    given = {**{k: v[0] for k, v in operation.inputs.items()}, **operation.attributes}
    lut = np.asarray(given["lut"]).reshape(-1)
    indices = np.asarray(given["indices"])
    if "shape" in given:  # iOS16: indices packed into bytes
        shape = tuple(int(n) for n in given["shape"])
        bits = len(lut).bit_length() - 1
        indices = unpack_bits(indices.tobytes(), bits, int(np.prod(shape))).reshape(shape)
    elif np.asarray(given["lut"]).size != np.asarray(given["lut"]).shape[-2]:
        return None
    return indices, lut


class Interpreter:
    """One function of a package, with its constants as tensors and its state kept between calls.

    Raises:
        InputError: an operation that this project does not export.
    """

    def __init__(self, function: Function, state: Mapping[str, Tensor] | None = None) -> None:
        self.function = function
        self.state = dict(state or {})
        self.constants: dict[str, Any] = {}
        for operation in function.operations:
            if operation.kind == "const":
                self.constants[operation.outputs[0].name] = _plain(operation.attributes["val"])
            elif (found := constant_weight(operation)) is not None:
                dense = found[1][found[0]]
                self.constants[operation.outputs[0].name] = _plain(dense)
        self._last_uses = self._find_last_uses()

    def _find_last_uses(self) -> list[list[str]]:
        """Per operation, the results that nothing after it needs: they need not be kept."""
        found: list[list[str]] = []
        needed = set(self.function.results)
        for operation in reversed(self.function.operations):
            used = {
                b.name for given in operation.inputs.values() for b in given if isinstance(b, Name)
            }
            found.append(
                []
                if operation.outputs and operation.outputs[0].name in self.constants
                else sorted(used - needed - self.constants.keys())
            )
            needed |= used
        return found[::-1]

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The function's results by name, float32; state is updated."""
        known: dict[str, Any] = {**self.constants, **inputs}
        for given in self.function.inputs:
            if not given.dtype:
                known[given.name] = given.name  # state is passed around by its name
        for place, operation in enumerate(self.function.operations):
            if operation.outputs and operation.outputs[0].name in self.constants:
                continue
            values = {
                name: self._bound(bound, known, operation.kind)
                for name, bound in operation.inputs.items()
            }
            results = self._compute(operation, values)
            results = results if isinstance(results, tuple | list) else (results,)
            for output, result in zip(operation.outputs, results, strict=True):
                known[output.name] = result
            for name in self._last_uses[place]:
                del known[name]
        return {name: known[name] for name in self.function.results}

    @staticmethod
    def _bound(bound: list[Any], known: Mapping[str, Any], kind: str) -> Any:
        values = [known[v.name] if isinstance(v, Name) else _plain(v) for v in bound]
        return values if len(values) > 1 or kind == "concat" else values[0]

    def _compute(self, operation: Operation, values: Values) -> Any:
        if operation.kind == "read_state":
            return self.state[values["input"]]
        if operation.kind == "write_state":
            self.state[values["input"]] = values["data"]
            return ()
        compute = _OPERATIONS.get(operation.kind)
        if compute is None:
            raise InputError(
                f"the package has the operation {operation.kind}, which this project does not write"
            )
        return compute(values)


def _plain(value: Any) -> Any:
    """Arrays as tensors, floats as float32; strings stay."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    tensor = torch.from_numpy(np.array(value))
    return tensor.float() if tensor.is_floating_point() else tensor


def _ints(value: Any) -> list[int]:
    return [int(v) for v in torch.as_tensor(value).reshape(-1)]


def _flag(values: Values, name: str) -> bool:
    return bool(torch.as_tensor(values.get(name, False)).any())


def _mask(values: Values, name: str, rank: int) -> list[bool]:
    given = values.get(name)
    return [False] * rank if given is None else [bool(v) for v in given.reshape(-1)]


def _place(values: Values) -> tuple[Any, ...]:
    """What `slice_by_index` and `slice_update` address."""
    x: Tensor = values["x"]
    begin, end = _ints(values["begin"]), _ints(values["end"])
    steps = _ints(values["stride"]) if "stride" in values else [1] * x.dim()
    open_begin, open_end = (_mask(values, f"{n}_mask", x.dim()) for n in ("begin", "end"))
    squeezed = _mask(values, "squeeze_mask", x.dim())
    at: list[Any] = []
    for axis in range(x.dim()):
        if squeezed[axis]:
            at.append(begin[axis])
            continue
        first = None if open_begin[axis] else begin[axis]
        last = None if open_end[axis] else end[axis]
        at.append(slice(first, last, steps[axis]))
    return tuple(at)


def _slice_update(values: Values) -> Tensor:
    x: Tensor = values["x"].clone()
    x[_place(values)] = values["update"]
    return x


def _conv(values: Values) -> Tensor:
    """A 1x1 convolution, the only kind that is written."""
    if tuple(values["weight"].shape[2:]) != (1, 1):
        raise InputError("the package has a convolution that is not 1x1")
    return F.conv2d(values["x"], values["weight"], values.get("bias"))


def _matmul(values: Values) -> Tensor:
    x, y = values["x"], values["y"]
    x = x.transpose(-1, -2) if _flag(values, "transpose_x") else x
    y = y.transpose(-1, -2) if _flag(values, "transpose_y") else y
    return torch.matmul(x, y)


def _gather(values: Values) -> Tensor:
    if _ints(values.get("batch_dims", 0)) != [0]:
        raise InputError("the package has a batched gather, which this project does not write")
    axis = _ints(values["axis"])[0]
    index = values["indices"]
    found = values["x"].index_select(axis, index.reshape(-1).long())
    shape = list(values["x"].shape)
    return found.reshape(shape[:axis] + list(index.shape) + shape[axis + 1 :])


def _split(values: Values) -> tuple[Tensor, ...]:
    axis = _ints(values["axis"])[0]
    if "split_sizes" in values:
        return values["x"].split(_ints(values["split_sizes"]), axis)
    return values["x"].chunk(_ints(values["num_splits"])[0], axis)


def _expand(values: Values) -> Tensor:
    x: Tensor = values["x"]
    for axis in sorted(_ints(values["axes"])):
        x = x.unsqueeze(axis)
    return x


def _reduced(function: Callable[..., Tensor]) -> Callable[[Values], Tensor]:
    return lambda v: function(v["x"], _ints(v["axes"]), keepdim=_flag(v, "keep_dims"))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Values], Tensor]:
    return lambda v: function(torch.as_tensor(v["x"]), torch.as_tensor(v["y"]))


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Values], Tensor]:
    return lambda v: function(v["x"])


_CASTS = {
    "fp16": torch.float32,  # nothing is rounded here
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int32,
    "uint16": torch.int32,
    "bool": torch.bool,
}

_OPERATIONS: dict[str, Callable[[Values], Any]] = {
    "abs": _unary(torch.abs),
    "add": _binary(torch.add),
    "cast": lambda v: v["x"].to(_CASTS[v["dtype"]]),
    "clip": lambda v: v["x"].clamp(float(v["alpha"]), float(v["beta"])),
    "concat": lambda v: torch.cat(v["values"], _ints(v["axis"])[0]),
    "conv": _conv,
    "expand_dims": _expand,
    "gather": _gather,
    "greater_equal": _binary(torch.ge),
    "identity": _unary(lambda x: x),
    "inverse": lambda v: 1 / (v["x"] + float(v["epsilon"])),
    "less": _binary(torch.lt),
    "logical_and": _binary(torch.logical_and),
    "matmul": _matmul,
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mul": _binary(torch.mul),
    "real_div": _binary(torch.div),
    "reduce_max": _reduced(torch.amax),
    "reduce_mean": _reduced(torch.mean),
    "reduce_sum": _reduced(torch.sum),
    "reshape": lambda v: v["x"].reshape(_ints(v["shape"])),
    "rsqrt": lambda v: torch.rsqrt(v["x"] + float(v["epsilon"])),
    "select": lambda v: torch.where(v["cond"].bool(), v["a"], v["b"]),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "slice_by_index": lambda v: v["x"][_place(v)],
    "slice_update": _slice_update,
    "softmax": lambda v: v["x"].softmax(_ints(v["axis"])[0]),
    "split": _split,
    "squeeze": lambda v: v["x"].squeeze(tuple(_ints(v["axes"]))),
    "sub": _binary(torch.sub),
    "tile": lambda v: v["x"].repeat(_ints(v["reps"])),
    "transpose": lambda v: v["x"].permute(_ints(v["perm"])),
}
