"""Several functions in one package, with one copy of the weights.

coremltools' own ``save_multifunction`` does the same by parsing, optimizing and writing every
program again; where the functions come from one graph, it is enough to put the programs side by
side and to let equal values of the weight file be one.

Weight file: a header of 64 bytes (number of values, version 2), then per value a header of 64 bytes
(sentinel, type, bytes, offset of the data, padding bits) and the data, both at multiples of 64.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from uuid import NAMESPACE_OID, uuid5

from lib.base.errors import CorruptError
from lib.base.files import read_json, write_json
from lib.export.package import MANIFEST, Package

_ALIGNMENT = 64
_COUNT = struct.Struct("<II")
_VALUE = struct.Struct("<IIQQQ")
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_DATE = "com.github.apple.coremltools.conversion_date"


class WeightFile:
    """A weight file being written: each value once, however often it is added.

    It is whole when the context is left.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(_ALIGNMENT))
        self._known: dict[str, int] = {}

    def add(self, source: memoryview, offset: int) -> int:
        """Copy the value at ``offset`` of another file, unless it is here; its offset here."""
        sentinel, kind, size, start, padding = _VALUE.unpack_from(source, offset)
        if sentinel != _SENTINEL or start + size > len(source):
            raise CorruptError(f"no stored value begins at offset {offset} of a weight file")
        data = source[start : start + size]
        key = f"{kind} {padding} {hashlib.sha256(data).hexdigest()}"
        if key not in self._known:
            place = self._file.tell()
            header = _VALUE.pack(_SENTINEL, kind, size, place + _ALIGNMENT, padding)
            self._file.write(header.ljust(_ALIGNMENT, b"\0"))
            self._file.write(data)
            self._file.write(bytes(-size % _ALIGNMENT))
            self._known[key] = place
        return self._known[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        with self._file:
            self._file.seek(0)
            self._file.write(_COUNT.pack(len(self._known), _VERSION))


def merge_packages(parts: dict[str, Path], out: Path, *, default: str, scratch: Path) -> None:
    """Write ``out`` with the ``main`` function of each package under the given name.

    Args:
        parts: package by function name.
        default: the function that a caller who names none gets.
        scratch: an empty folder for the weight file.

    Raises:
        CorruptError: a package cannot be read.
    """
    from coremltools.models.utils import save_spec
    from coremltools.proto import Model_pb2

    merged = Model_pb2.Model()
    with WeightFile(scratch / "weight.bin") as weights:
        for name, path in parts.items():
            package = Package(path)
            spec = package.spec
            merged.specificationVersion = max(
                merged.specificationVersion, spec.specificationVersion
            )
            merged.mlProgram.version = spec.mlProgram.version
            function = merged.mlProgram.functions[name]
            function.CopyFrom(spec.mlProgram.functions["main"])
            stored = memoryview(package.weights_file.read_bytes())
            for value in _file_values(function):
                value.blobFileValue.offset = weights.add(stored, value.blobFileValue.offset)
            described = merged.description.functions.add(name=name)
            for field in ("input", "output", "state"):
                getattr(described, field).extend(getattr(spec.description, field))
            for key, text in spec.description.metadata.userDefined.items():
                merged.description.metadata.userDefined[key] = text
    merged.description.defaultFunctionName = default
    save_spec(merged, str(out), weights_dir=str(scratch))
    make_reproducible(out)


def make_reproducible(package: Path) -> None:
    """Rewrite what differs between two exports of one model: identifiers, date, order of maps."""
    from coremltools.proto import Model_pb2

    found = Package(package)
    spec = Model_pb2.Model()
    spec.CopyFrom(found.spec)
    spec.description.metadata.userDefined.pop(_DATE, None)
    found.program_file.write_bytes(spec.SerializeToString(deterministic=True))
    manifest = read_json(package / MANIFEST)
    names = {old: str(uuid5(NAMESPACE_OID, entry["path"])) for old, entry in _entries(manifest)}
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in _entries(manifest)}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    write_json(package / MANIFEST, manifest)


def _entries(manifest: Any) -> list[tuple[str, Any]]:
    entries: dict[str, Any] = manifest["itemInfoEntries"]
    return sorted(entries.items(), key=lambda pair: str(pair[1]["path"]))


def _file_values(function: Any) -> Iterator[Any]:
    """Every value of a function that lies in the weight file, always in one order."""
    for block in _in_order(function.block_specializations):
        for operation in block.operations:
            bound = [
                argument.value
                for given in _in_order(operation.inputs)
                for argument in given.arguments
                if argument.WhichOneof("binding") == "value"
            ]
            for value in (*_in_order(operation.attributes), *bound):
                if value.WhichOneof("value") == "blobFileValue":
                    yield value


def _in_order(values: Any) -> list[Any]:
    """Values of a protobuf map by their keys; its own order changes from process to process."""
    return [values[key] for key in sorted(values)]
