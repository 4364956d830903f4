"""The first run: what it leaves, and that its training works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lib.params.load import read_yaml
from tests.architecture import outputs_of
from tests.pipeline.project import ROOT, STAGES, Project


def test_every_stage_ran_once_in_order(baseline: Project) -> None:
    assert baseline.ran() == list(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_declared_outputs_are_there(baseline: Project, stage: str) -> None:
    declared = outputs_of(read_yaml(ROOT / "dvc.yaml")["stages"][stage])
    assert baseline.outputs(stage).keys() == set(declared)
    assert all((baseline.folder / path).exists() for path in declared)


def test_nothing_else_is_left(baseline: Project) -> None:
    declared = {path for stage in STAGES for path in baseline.outputs(stage)}
    for top in ("data", "runs"):
        for path in (baseline.folder / top).rglob("*"):
            name = path.relative_to(baseline.folder).as_posix()
            known = any(name == out or name.startswith(f"{out}/") for out in declared)
            assert known or path.is_dir() or name.startswith("data/local/"), name
    left = {path.suffix for path in (baseline.folder / ".ckpt").glob("*/*")}
    assert left == {".lock"}  # no scratch folder: every run succeeded


def test_git_has_the_small_results_and_dvc_the_big_ones(baseline: Project) -> None:
    assert baseline.git("status", "--short") == ""
    tracked = baseline.git("ls-files", "data", "runs", "dvc.lock").split()
    assert {"dvc.lock", "runs/evaluate/ladder.md", "runs/scales/metrics.json"} <= set(tracked)
    assert not [name for name in tracked if name.endswith((".safetensors", ".arrow"))]


@pytest.mark.parametrize("stage", ["scales", "weights", "finetune", "finetune_q2"])
def test_training_lowers_the_held_out_loss(baseline: Project, stage: str) -> None:
    metrics = baseline.metrics(stage)
    assert metrics["best_kd"] < 0.95 * metrics["initial_kd"]
    assert metrics["best_step"] > 0


def test_every_layer_is_compared_with_its_grid(baseline: Project) -> None:
    grid = json.loads(baseline.read("runs/weights/grid.json"))
    assert len(grid["layers"]) == 14
    assert all(0 < layer["hit_rate"] < 1 for layer in grid["layers"].values())
    metrics = baseline.metrics("weights")
    assert metrics["hit_rate"] == grid["overall"]["hit_rate"]
    assert baseline.read("runs/weights/grid.svg").startswith("<?xml")


def test_conversion_loses_less_than_the_reference_rule(baseline: Project) -> None:
    metrics = baseline.metrics("convert")
    assert metrics["kd_before"] < metrics["kd_after"] < metrics["kd_reference_rule"]
    assert (metrics["converted"], metrics["kept"]) == (6, 8)


def test_a_second_run_does_nothing(project: Project) -> None:
    output = project.dvc("repro")
    assert "Data and pipelines are up to date." in output
    assert "Running stage" not in output
    assert project.ran() == []


def test_a_second_run_without_git_does_nothing(project: Project) -> None:
    shutil.rmtree(project.folder / ".git")
    project.dvc("config", "--local", "core.no_scm", "true")
    project.dvc("config", "--local", "core.autostage", "false")
    assert "Data and pipelines are up to date." in project.dvc("repro")
    assert project.ran() == []


def test_edited_text_reruns_tokens(project: Project) -> None:
    Path(project.folder, "data/local/more.txt").write_text("A new document.\n")
    status = project.dvc("status", "tokens")
    assert "data/local" in status


def test_the_ladder_ends_with_the_adapter(baseline: Project) -> None:
    rows = json.loads(baseline.read("runs/evaluate/ladder.json"))["rows"]
    assert [row["model"] for row in rows][-2:] == ["snap", "+ adapter"]
    assert rows[-1]["packed_mb"] > rows[-2]["packed_mb"]
    assert rows[-1]["kl"] != rows[-2]["kl"]
