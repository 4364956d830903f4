"""Functions side by side in one package: equal values once, every value where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.base.errors import CorruptError
from lib.export.merge import WeightFile, merge_packages
from lib.export.package import Package
from tests.export.models import package


def _constants(path: Path, function: str) -> dict[str, np.ndarray]:
    found = {}
    for operation in Package(path).function(function).operations:
        value = operation.attributes.get("val")
        if isinstance(value, np.ndarray):
            found[operation.outputs[0].name] = value
    return found


def test_functions_of_one_graph_share_their_values(tmp_path: Path) -> None:
    source = package("qwen3", "iOS16")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    out = tmp_path / "both.mlpackage"
    merge_packages({"one": source, "two": source}, out, default="two", scratch=scratch)
    merged = Package(out)
    assert merged.functions == ["one", "two"]
    assert merged.weights_file.stat().st_size <= Package(source).weights_file.stat().st_size
    expected = _constants(source, "main")
    for name in ("one", "two"):
        assert {k: v.tobytes() for k, v in _constants(out, name).items()} == {
            k: v.tobytes() for k, v in expected.items()
        }


def test_coremltools_reads_it_too() -> None:
    from coremltools.models import MLModel

    spec = MLModel(str(package()), skip_model_load=True).get_spec()
    assert spec.description.defaultFunctionName == "decode"
    described = {f.name: f for f in spec.description.functions}
    assert set(described) == {"prefill", "decode"}
    assert [s.name for s in described["prefill"].state] == ["keys", "values"]


def test_their_own_library_reads_the_weight_file() -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader

    found = Package(package())
    reader = _BlobStorageReader(str(found.weights_file))
    block = found.spec.mlProgram.functions["prefill"]
    operations = block.block_specializations[block.opset].operations
    checked = 0
    for operation in operations:
        if operation.type != "const":
            continue
        value = operation.attributes["val"]
        if value.WhichOneof("value") != "blobFileValue":
            continue
        own = found._value(value)
        if own.dtype == np.float16:
            theirs = np.array(reader.read_fp16_data(value.blobFileValue.offset))
            assert theirs.view(np.float16).tobytes() == own.tobytes()
            checked += 1
    assert checked > 0


def test_an_offset_without_a_value_is_refused(tmp_path: Path) -> None:
    with (
        WeightFile(tmp_path / "weight.bin") as weights,
        pytest.raises(CorruptError, match="no stored value begins at offset 64"),
    ):
        weights.add(memoryview(bytes(256)), 64)
