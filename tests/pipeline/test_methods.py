"""Block after block inside the pipeline: it learns, and a power cut changes nothing."""

from __future__ import annotations

import csv
import signal

import pytest

from tests.pipeline.project import Project

IN_BLOCK_1 = "lib.train.by_block _train_one 2"
WRITING_BLOCK_1 = "lib.train.by_block _keep 1"  # block 0 is not done again
FIRST_STATES = "lib.train.activations atomic_file 1"


@pytest.mark.parametrize("stage", ["scales", "weights"])
@pytest.mark.parametrize("method", ["layerwise", "blockwise"])
def test_killed_and_resumed(project: Project, stage: str, method: str) -> None:
    project.set(stage, "method", method)
    project.set("blockwise", "adaptive", "0.25")
    project.dvc("repro", stage)
    whole, metrics = project.locked()[stage], project.metrics(stage)
    assert metrics["best_kd"] < metrics["initial_kd"]
    assert metrics["most_epochs"] >= metrics["fewest_epochs"] > 0
    assert (metrics["most_epochs"] > metrics["fewest_epochs"]) == (method == "blockwise")
    project.forget(stage)
    for place in (FIRST_STATES, IN_BLOCK_1, WRITING_BLOCK_1):
        project.dvc("repro", stage, status=-signal.SIGKILL, HALT=f"{stage} {place} kill")
    output = project.dvc("repro", stage)
    assert "block 1:" in output and "block 0:" not in output  # it was done
    assert project.locked()[stage] == whole and project.metrics(stage) == metrics
    assert not list(project.folder.glob(f".ckpt/{stage}/*/blocks"))


def test_proximal_training_killed_and_resumed(project: Project) -> None:
    """The same for a run whose coefficient is controlled."""
    project.set("weights", "regularizer", "prox")
    changes = {"control": "dual", "k_i": "0.05", "fisher": "true", "hard": "selective"}
    for key, value in changes.items():
        project.set("prox", key, value)
    before = project.metrics("weights")
    assert "prox_coefficient" not in before and 0 < before["hit_rate"] < 1
    output = project.dvc("repro", "weights")
    assert "initial held-out loss" in output and "final held-out loss" in output
    whole, metrics = project.locked()["weights"], project.metrics("weights")
    assert metrics["prox_coefficient"] > 0
    rows = list(csv.DictReader(project.read("runs/weights/log.csv").splitlines()))
    assert float(rows[-1]["hit_rate"]) > 1.5 * float(rows[0]["hit_rate"])
    project.forget("weights")
    halt = "weights lib.train.loop save_state 2 kill"
    project.dvc("repro", "weights", status=-signal.SIGKILL, HALT=halt)
    output = project.dvc("repro", "weights")
    assert "going on after step" in output
    assert project.locked()["weights"] == whole and project.metrics("weights") == metrics
