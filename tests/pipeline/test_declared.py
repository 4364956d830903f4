"""A stage needs what dvc.yaml says and no more: it runs where only its declared data exist."""

from __future__ import annotations

import hashlib
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from lib.params.load import read_yaml
from tests.architecture import outputs_of, paths_of
from tests.pipeline.project import MACHINE, ROOT, STAGES, Project


def digests(folder: Path, outputs: list[str]) -> dict[str, str]:
    """Every file of a stage's outputs, with its digest."""
    found = {}
    for output in outputs:
        path = folder / output
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        for file in inside if path.is_dir() else [path]:
            name = file.relative_to(folder).as_posix()
            if name not in MACHINE:
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("name", STAGES)
def test_declared_data_is_enough_and_results_repeat(
    baseline: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stage: dict[str, Any] = read_yaml(ROOT / "dvc.yaml")["stages"][name]
    given = [path for path in paths_of(stage["deps"]) if path.startswith(("data/", "runs/"))]
    for path in [*given, "params.yaml", "dvc.yaml", "tests/data"]:
        source, target = baseline.folder / path, tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    _, _, _, *arguments = stage["cmd"].split()
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(ROOT / "stages" / f"{name}.py"), run_name="__main__")
    outputs = outputs_of(stage)
    assert digests(tmp_path, outputs) == digests(baseline.folder, outputs)
