"""Damaging a package on disk, at the place where its program says a value lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.export.package import Package


def damaged(source: Path, out: Path, kind: str, change: Callable[[np.ndarray], None]) -> Path:
    """A copy whose first ``indices`` or ``lut`` (``kind``) of a LUT weight is changed in place.

    ``change`` gets the stored bytes of the indices, or the FP16 levels of the LUT.
    """
    shutil.copytree(source, out)
    package = Package(out)
    mil = package.spec.mlProgram
    name = package.functions[0]
    block = mil.functions[name].block_specializations[mil.functions[name].opset]
    operation = next(o for o in block.operations if o.type == "constexpr_lut_to_dense")
    bound = operation.inputs[kind].arguments[0]
    stored = {o.outputs[0].name: o for o in block.operations if o.outputs}
    value = (
        bound.value
        if bound.WhichOneof("binding") == "value"
        else (stored[bound.name].attributes["val"])
    )
    where = value.WhichOneof("value")
    if where == "immediateValue":
        values = value.immediateValue.tensor.bytes
        data = np.frombuffer(values.values, dtype=np.float16 if kind == "lut" else np.uint8).copy()
        change(data)
        values.values = data.tobytes()
        package.program_file.write_bytes(package.spec.SerializeToString())
        return out
    offset = value.blobFileValue.offset
    content = bytearray(package.weights_file.read_bytes())
    size = int.from_bytes(content[offset + 8 : offset + 16], "little")
    start = int.from_bytes(content[offset + 16 : offset + 24], "little")
    data = np.frombuffer(
        bytes(content[start : start + size]), dtype=np.float16 if kind == "lut" else np.uint8
    ).copy()
    change(data)
    content[start : start + size] = data.tobytes()
    package.weights_file.write_bytes(content)
    return out
