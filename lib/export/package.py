"""Reading an ``.mlpackage`` without coremltools' own reader: protobuf schema and weight file.

What is read here is what a device would read: a value comes from ``weight.bin`` at the offset that
the program names, with the type and size that the file itself states.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lib.base.errors import CorruptError

Array = np.ndarray[Any, np.dtype[Any]]

MANIFEST = "Manifest.json"
_SENTINEL = 0xDEADBEEF
_ALIGNMENT = 64  # values begin at multiples of it, and so does their data
_HEADER = struct.Struct("<IIQQQ")  # sentinel, type, bytes, offset of the data, padding bits
_DTYPES: dict[str, type[Any]] = {
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "UINT16": np.uint16,
    "INT32": np.int32,
    "UINT32": np.uint32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
_PACKED = {"UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6}  # bits
_IN_FILE = {
    1: "FLOAT16",
    2: "FLOAT32",
    3: "UINT8",
    4: "INT8",
    6: "INT16",
    7: "UINT16",
    9: "UINT1",
    10: "UINT2",
    11: "UINT4",
    12: "UINT3",
    13: "UINT6",
    14: "INT32",
    15: "UINT32",
}


def unpack_bits(data: bytes, bits: int, count: int) -> Array:
    """``count`` unsigned integers of ``bits`` bits, little end first, as uint8 ``[count]``."""
    if 8 % bits:
        planes = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits]
        weights = (1 << np.arange(bits)).astype(np.uint8)
        return (planes.reshape(count, bits) * weights).sum(1, dtype=np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = np.frombuffer(data, np.uint8)[:, None] >> shifts
    return (parts & np.uint8((1 << bits) - 1)).reshape(-1)[:count]


@dataclass(frozen=True)
class Operation:
    """One operation of a program: its inputs are names of results, or values."""

    kind: str
    name: str
    inputs: dict[str, list[Any]]
    """Per input, what is bound to it: a :class:`Name`, or a value."""
    attributes: dict[str, Any]
    outputs: list[Output]


@dataclass(frozen=True)
class Output:
    """A result: its name, element type (``FLOAT16``, ...; empty for state) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A reference to an earlier result or to an input."""

    name: str


@dataclass(frozen=True)
class Function:
    """A function of a package, its operations in order."""

    inputs: list[Output]
    operations: list[Operation]
    results: list[str]


class Package:
    """An ``.mlpackage`` folder.

    Raises:
        CorruptError: a part is missing, or the weight file is not what the program says of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            parts = [entry["path"] for entry in manifest["itemInfoEntries"].values()]
            model = next(path for path in parts if path.endswith(".mlmodel"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise CorruptError(f"{folder} is no .mlpackage ({error}); export it again") from None
        self.program_file = folder / "Data" / model
        self.weights_file = self.program_file.parent / "weights" / "weight.bin"
        self._functions: dict[str, Function] = {}
        self._read: dict[tuple[int, str, tuple[int, ...]], Array] = {}  # functions share values

    @cached_property
    def spec(self) -> Any:
        """The parsed ``Model`` message."""
        from coremltools.proto import Model_pb2

        spec = Model_pb2.Model()
        try:
            spec.ParseFromString(self.program_file.read_bytes())
        except Exception as error:  # protobuf's own type depends on its backend
            raise CorruptError(f"{self.program_file} is no Core ML program ({error})") from None
        return spec

    @cached_property
    def _weights(self) -> Array:
        try:
            return np.memmap(self.weights_file, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CorruptError(f"{self.weights_file} cannot be read ({error})") from None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all values in the weight file, without headers and gaps."""
        total, offset = 0, _ALIGNMENT
        count = int(np.frombuffer(self._weights[:4].tobytes(), np.uint32)[0])
        for _ in range(count):
            _, size, start, _ = self._header(offset)
            total += size
            offset = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        return total + max(0, len(self._weights) - offset)  # what no header speaks of, too

    @property
    def functions(self) -> list[str]:
        """Names of the package's functions."""
        return sorted(self.spec.mlProgram.functions)

    def function(self, name: str) -> Function:
        """One function, with every constant read."""
        if name not in self._functions:
            self._functions[name] = self._read_function(name)
        return self._functions[name]

    def _read_function(self, name: str) -> Function:
        function = self.spec.mlProgram.functions[name]
        block = function.block_specializations[function.opset]
        return Function(
            inputs=[_output(given) for given in function.inputs],
            operations=[self._operation(op) for op in block.operations],
            results=list(block.outputs),
        )

    def _operation(self, op: Any) -> Operation:
        attributes = {name: self._value(value) for name, value in op.attributes.items()}
        return Operation(
            kind=op.type,
            name=str(attributes.get("name", "")),
            inputs={
                name: [
                    Name(bound.name)
                    if bound.WhichOneof("binding") == "name"
                    else self._value(bound.value)
                    for bound in given.arguments
                ]
                for name, given in op.inputs.items()
            },
            attributes=attributes,
            outputs=[_output(result) for result in op.outputs],
        )

    def _value(self, value: Any) -> Any:
        """A number, a string or an array."""
        kind = value.type.WhichOneof("type")
        if kind != "tensorType":
            items = value.immediateValue.list.values if kind == "listType" else ()
            return [self._value(item) for item in items]
        dtype, shape = _tensor_type(value.type.tensorType)
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(int(value.blobFileValue.offset), dtype, shape)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            return np.zeros(shape, _DTYPES.get(dtype, np.uint8))
        stored = getattr(tensor, field).values
        if field == "strings":
            return str(stored[0])
        if field != "bytes":
            return np.array(list(stored)).astype(_DTYPES[dtype]).reshape(shape)
        return _array(bytes(stored), dtype, shape)

    def _blob(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        key = (offset, dtype, shape)
        if key not in self._read:
            self._read[key] = self._read_blob(*key)
        return self._read[key]

    def _header(self, offset: int) -> tuple[int, int, int, int]:
        """(type, bytes, offset of the data, padding bits) of the value at an offset."""
        header = bytes(self._weights[offset : offset + _HEADER.size])
        where = f"{self.weights_file}, offset {offset}"
        if len(header) < _HEADER.size:
            raise CorruptError(f"{where}: beyond the end of the file; export again")
        sentinel, kind, size, start, padding = _HEADER.unpack(header)
        if sentinel != _SENTINEL:
            raise CorruptError(f"{where}: no stored value begins here; export again")
        return kind, size, start, padding

    def _read_blob(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        where = f"{self.weights_file}, offset {offset}"
        kind, size, start, padding = self._header(offset)
        stored = _IN_FILE.get(kind, str(kind))
        if stored != dtype and (dtype, stored) != ("BOOL", "UINT8"):
            raise CorruptError(f"{where}: the program wants {dtype}, the file holds {stored}")
        count = int(np.prod(shape))
        bits = _PACKED.get(dtype, np.dtype(_DTYPES.get(dtype, np.uint8)).itemsize * 8)
        spare = padding if dtype in _PACKED else 0
        if size * 8 - spare != count * bits or start + size > len(self._weights):
            raise CorruptError(f"{where}: {size} bytes do not hold {list(shape)} of {dtype}")
        return _array(bytes(self._weights[start : start + size]), dtype, shape)


def _array(data: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype in _PACKED:
        return unpack_bits(data, _PACKED[dtype], int(np.prod(shape))).reshape(shape)
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _tensor_type(kind: Any) -> tuple[str, tuple[int, ...]]:
    dtype = kind.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[kind.dataType]
    return dtype.name, tuple(int(d.constant.size) for d in kind.dimensions)


def _output(named: Any) -> Output:
    kind = named.type
    if kind.WhichOneof("type") == "stateType":
        _, shape = _tensor_type(kind.stateType.wrappedType.tensorType)
        return Output(named.name, "", shape)
    if kind.WhichOneof("type") != "tensorType":
        return Output(named.name, "", ())
    return Output(named.name, *_tensor_type(kind.tensorType))
