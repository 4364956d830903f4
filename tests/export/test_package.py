"""The reader gives what was stored, and refuses what is not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.base.errors import CorruptError
from lib.export.package import Name, Package, unpack_bits
from tests.export.models import SLOTS, TOKENS, decoder, package


def test_its_functions_and_inputs() -> None:
    found = Package(package())
    assert found.functions == ["decode", "prefill"]
    prefill = found.function("prefill")
    given_inputs = {i.name: (i.dtype, i.shape) for i in prefill.inputs}
    shape = decoder().cache_shape
    assert given_inputs == {
        "ids": ("INT32", (TOKENS,)),
        "positions": ("INT32", (TOKENS,)),
        "mask": ("FLOAT16", (1, 1, TOKENS, SLOTS)),
        "write": ("FLOAT16", (1, 1, TOKENS, SLOTS)),
        "keys": ("", shape),
        "values": ("", shape),
    }
    assert prefill.results == ["logits_0"]
    assert {i.name: i.shape for i in found.function("decode").inputs}["ids"] == (1,)


def test_its_constants_are_the_graphs() -> None:
    convs = [o for o in Package(package()).function("decode").operations if o.kind == "conv"]
    stored = {
        o.outputs[0].name: o.attributes.get("val")
        for o in Package(package()).function("decode").operations
        if o.kind == "const"
    }
    bound = convs[-1].inputs["weight"][0]
    assert isinstance(bound, Name)
    head = decoder().head[0].numpy().astype(np.float16)
    assert np.array_equal(stored[bound.name], head)


@given(st.integers(1, 6), st.lists(st.integers(0, 63), min_size=1, max_size=20))
def test_bits_are_unpacked(bits: int, values: list[int]) -> None:
    values = [value % (1 << bits) for value in values]
    whole = sum(value << (bits * place) for place, value in enumerate(values))
    data = whole.to_bytes(-(-bits * len(values) // 8), "little")
    assert unpack_bits(data, bits, len(values)).tolist() == values


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"is no \.mlpackage"):
        Package(tmp_path)
    (tmp_path / "Manifest.json").write_text(json.dumps({"itemInfoEntries": {}}))
    with pytest.raises(CorruptError, match=r"is no \.mlpackage"):
        Package(tmp_path)


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mlpackage"
    shutil.copytree(package(), bad)
    weights = Package(bad).weights_file
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CorruptError, match=r"weight\.bin, offset"):
        Package(bad).function("decode")


def test_an_overwritten_header_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mlpackage"
    shutil.copytree(package(), bad)
    weights = Package(bad).weights_file
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(CorruptError, match="no stored value begins here"):
        Package(bad).function("decode")


def test_a_program_that_is_no_message_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mlpackage"
    shutil.copytree(package(), bad)
    Package(bad).program_file.write_bytes(b"\xff" * 100)
    with pytest.raises(CorruptError, match="no Core ML program"):
        Package(bad).functions  # noqa: B018
