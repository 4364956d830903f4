"""The conversion: what it leaves behind, and processes for large graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lib.base.errors import InputError
from lib.export import coreml
from lib.export.audit import audit_package
from lib.export.coreml import import_coremltools, save_package
from lib.export.package import Package
from tests.export.models import TOKENS, decoder


def test_processes_give_the_same_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "_WORTH_A_PROCESS", 0)
    graph = decoder()
    out = tmp_path / "model.mlpackage"
    save_package(graph, out, tokens=TOKENS, target="iOS18")
    audit = audit_package(Package(out), graph)
    assert audit.faults == [] and audit.layers == 14
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]
    assert not any("_COREML_" in name for name, _ in graph.named_buffers())


@pytest.mark.parametrize("target", ["iOS18", "iOS16"])
def test_twice_gives_the_same_bytes(target: Any, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        out = tmp_path / name / "model.mlpackage"
        out.parent.mkdir()
        save_package(decoder(), out, tokens=TOKENS, target=target)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        made.append({path.relative_to(out): path.read_bytes() for path in files})
    assert len(made[0]) == 3 and made[0] == made[1]


def test_without_coremltools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(InputError, match="coremltools is not installed here"):
        import_coremltools()
