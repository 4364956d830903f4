"""What a change of params.yaml reruns: what depends on it, and nothing else."""

from __future__ import annotations

import json

import pytest

from lib.params.load import read_yaml
from tests.architecture import is_under, outputs_of, paths_of
from tests.pipeline.project import ROOT, STAGES, Project

TRAINED = STAGES[STAGES.index("scales") :]


def following(names: set[str]) -> set[str]:
    """These stages and all that depend on what they write."""
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    found = set(names)
    for name in STAGES:  # in the order of their dependencies
        written = [path for other in found for path in outputs_of(stages[other])]
        if any(is_under(dep, path) for dep in paths_of(stages[name]["deps"]) for path in written):
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("section", "key", "value", "stages"),
    [
        ("calibrate", "sequences", "4", set(STAGES) - {"teacher", "tokens", "cache"}),
        ("quant", "lut_size", "4", {"quant", "sensitivity", *TRAINED}),
        ("teacher", "seed", "1", set(STAGES)),
        ("tokens", "seed", "1", set(STAGES) - {"teacher"}),
        ("cache", "negatives", "8", set(STAGES) - {"teacher", "tokens", "calibrate", "quant"}),
        ("sensitivity", "batches", "2", following({"sensitivity"})),
        ("weights", "steps", "9", set(TRAINED) - {"scales"}),
        ("convert", "rank", "8", set(TRAINED) - {"scales", "weights", "finetune"}),
        ("evaluate", "new_tokens", "4", {"evaluate"}),
        ("run", "device", "cpu", set()),
        ("run", "log_every", "3", set()),
    ],
)
def test_a_changed_key_reruns(
    project: Project, section: str, key: str, value: str, stages: set[str]
) -> None:
    before = project.read("params.yaml")
    project.set(section, key, value)
    assert project.read("params.yaml") != before
    changed = json.loads(project.dvc("status", "--json"))
    assert following(set(changed)) == stages


def test_only_evaluate_runs(project: Project) -> None:
    project.set("evaluate", "new_tokens", "4")
    project.dvc("repro")
    assert project.ran() == ["evaluate"]


def test_same_params_same_results(project: Project) -> None:
    scales, metrics = project.outputs("scales"), project.metrics("evaluate")
    project.dvc("repro", "--force", "--single-item", "scales")
    project.dvc("repro", "--force", "--single-item", "evaluate")
    assert project.ran() == ["scales", "evaluate"]
    assert project.outputs("scales") == scales
    assert project.metrics("evaluate") == metrics


@pytest.mark.parametrize("stage", [*STAGES[: STAGES.index("snap") + 1], "recover"])
def test_what_takes_minutes_can_be_restored(stage: str) -> None:
    """DVC keeps no run cache of a stage with outs that it does not cache (metrics do not count)."""
    outs = read_yaml(ROOT / "dvc.yaml")["stages"][stage]["outs"]
    assert outs and all(isinstance(out, str) for out in outs)  # none has options


def test_an_earlier_result_is_restored(project: Project) -> None:
    before = project.read("params.yaml"), project.read("runs/sensitivity/scores.json")
    project.set("sensitivity", "batches", "2")
    project.dvc("repro", "sensitivity")
    assert project.ran() == ["sensitivity"]
    assert project.read("runs/sensitivity/scores.json") != before[1]
    (project.folder / "params.yaml").write_text(before[0], encoding="utf-8")
    assert "'sensitivity' is cached" in project.dvc("repro", "sensitivity")
    assert project.ran() == ["sensitivity"]  # not once more
    assert project.read("runs/sensitivity/scores.json") == before[1]
