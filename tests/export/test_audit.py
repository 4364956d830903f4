"""The audit passes what is exact, and names the layer of anything else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.export.audit import _check_types, _difference, audit_package
from lib.export.graph import DeployedDecoder
from lib.export.package import Function, Operation, Output, Package
from lib.quant.spec import ScaleForm
from tests.export.editing import damaged
from tests.export.models import KINDS, SLOTS, decoder, package, snapped

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_package_is_exact(family: str) -> None:
    audit = audit_package(Package(package(family)), decoder(family))
    assert audit.faults == []
    assert audit.layers == 14
    assert audit.operations["constexpr_lut_to_dense"] == 2 * 14
    assert audit.bits_per_weight is not None and audit.bits_per_weight > 2


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_other_kinds_of_model_are_exact(changes: dict[str, Any]) -> None:
    audit = audit_package(Package(package("llama", **changes)), decoder("llama", **changes))
    assert audit.faults == []
    assert (audit.layers, audit.dense) == ((0, 15) if "baked" in changes else (14, 1))


@pytest.mark.parametrize("target", ["iOS18", "iOS16"])
def test_the_members_of_groups_are_stored_and_counted_once(target: str) -> None:
    options: dict[str, Any] = {"scale": ScaleForm.GROUP, "group_size": 8}
    graph, made = decoder("llama", **options), Package(package("llama", target, **options))
    audit = audit_package(made, graph)
    assert audit.faults == []  # such as bytes that are not accounted for
    packed = sum(m.indices.numel() / 4 for m in graph.layers().values())
    own = sum(2 * (m.lut.numel() + m.a.numel()) for m in graph.layers().values())
    members = 2 * (4 * 32 + 8 * 64)  # of layers with 32 and with 64 inputs
    assert audit.megabytes["layers"] == (packed + own + members) / 1e6


def test_ios16_is_exact_too() -> None:
    audit = audit_package(Package(package("qwen3", "iOS16")), decoder("qwen3"))
    assert audit.faults == [] and audit.layers == 14


def test_one_flipped_index_is_found(tmp_path: Path) -> None:
    def flip(data: np.ndarray) -> None:
        data[5] ^= 1

    bad = damaged(package(), tmp_path / "bad.mlpackage", "indices", flip)
    faults = audit_package(Package(bad), decoder()).faults
    assert faults and all(FIRST in fault for fault in faults)
    assert "1 indices differ, first at row 0, column 20" in faults[0]


def test_a_reversed_lut_is_found(tmp_path: Path) -> None:
    def reverse(data: np.ndarray) -> None:
        data[:] = data[::-1].copy()

    bad = damaged(package(), tmp_path / "bad.mlpackage", "lut", reverse)
    faults = audit_package(Package(bad), decoder()).faults
    assert faults and "its LUT is" in faults[0] and FIRST in faults[0]


def test_a_stale_package_is_found() -> None:
    model = snapped("qwen3")
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.indices[3, 4] = (layer.indices[3, 4] + 1) % 4
    faults = audit_package(Package(package()), DeployedDecoder(model, SLOTS)).faults
    assert len(faults) == 2  # in both functions
    assert "model.layers.1.mlp.up_proj: 1 indices differ, first at row 3, column 4" in faults[0]


def test_a_dense_weight_is_found() -> None:
    maker = Operation("const", "w", {}, {}, [Output("w", "FLOAT16", (2, 2, 1, 1))])
    module = next(iter(decoder().layers().values()))
    assert "stored as const" in _difference(module, maker)
    assert "stored as an input" in _difference(module, None)


@pytest.mark.parametrize("part", ["head", "b", "gain", "cosines"])
def test_another_dense_constant_is_found(part: str) -> None:
    model = snapped("llama")
    graph = DeployedDecoder(model, SLOTS)
    name, value = next(
        (n, v)
        for n, v in (*graph.named_parameters(), ("cosines", graph.cosines))
        if part in n.split(".")
    )
    value.data.select(0, 0).add_(1)
    faults = audit_package(Package(package("llama")), graph).faults
    wanted = {"head": "slice 0 of the head", "cosines": "rotary cosines"}.get(part, name)
    assert faults and all(wanted in fault for fault in faults[::2])


def test_one_dense_copy_of_one_layer_is_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mlpackage"
    shutil.copytree(package(), bad)
    graph = decoder()
    copy = min(2 * m.indices.numel() for m in graph.layers().values())
    with Package(bad).weights_file.open("ab") as file:
        file.write(bytes(copy))
    faults = audit_package(Package(bad), graph).faults
    assert len(faults) == 1 and "something is stored twice or dense" in faults[0]


def _function(kind: str, dtype: str, shape: tuple[int, ...], **attributes: Any) -> Function:
    operation = Operation(kind, "x", {}, attributes, [Output("x", dtype, shape)])
    return Function(inputs=[], operations=[operation], results=["x"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_function("mul", "FLOAT32", (1, 2, 1, 3)), "is FLOAT32"),
        (_function("mul", "FLOAT16", (1, 2, 0, 3)), "no fixed shape"),
        (_function("mul", "FLOAT16", (1, 2, 1, 1, 3)), "rank 5"),
        (_function("mul", "FLOAT16", (1, 2, 1, 16385)), "too large"),
        (_function("mul", "FLOAT16", (1, 65537, 1, 1)), "too large"),
        (_function("conv", "FLOAT16", (1, 16385, 1, 1)), "more than 16384"),
        (_function("const", "FLOAT16", (1,), val=np.array([np.inf], np.float16)), "not finite"),
    ],
)
def test_what_the_device_cannot_do_is_found(function: Function, message: str) -> None:
    faults: list[str] = []
    _check_types(function, 1, "main", faults)
    assert len(faults) == 1 and message in faults[0]
    harmless = replace(
        function.operations[0],
        kind="mul",
        attributes={},
        outputs=[Output("x", "FLOAT16", (1, 2, 1, 3))],
    )
    faults.clear()
    _check_types(replace(function, operations=[harmless]), 1, "main", faults)
    assert not faults
