"""Trials beside the workspace: `dvc exp run --temp`, the queue, and the table of experiments."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import pytest

from tests.pipeline.project import Project

# What the README recommends: results and changed parameters, no paths.
SHOW = ("exp", "show", "--csv", "--only-changed", "--hide-workspace", "--drop")
DROP = r".*/|ane_check|snap|.*\.(initial_kd|final_kd|best_step)"


@pytest.fixture(scope="module")
def tried(baseline: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the experiment that starts with 4 levels, up to the conversion."""
    project = baseline.copy(tmp_path_factory.mktemp("tried") / "lutqat")
    options = ("--set-param", "quant.lut_size=4", "--name=two-bits")
    project.dvc("exp", "run", "--temp", *options, "convert")
    return project


def table(project: Project) -> dict[str, dict[str, str]]:
    """The rows of `dvc exp show`, by name or revision."""
    rows = csv.DictReader(io.StringIO(project.dvc(*SHOW, DROP)))
    return {row["Experiment"] or row["rev"]: row for row in rows}


def test_teacher_tokens_and_cache_are_kept(tried: Project) -> None:
    assert tried.ran() == ["quant", "sensitivity", "scales", "weights", "finetune", "convert"]


def test_it_runs_the_code_of_its_own_copy(tried: Project) -> None:
    exps = tried.folder / ".dvc" / "tmp" / "exps"
    for _stage, folder, library in tried.runs():
        assert Path(folder).is_relative_to(exps)
        assert Path(library).is_relative_to(folder)


def test_the_workspace_is_untouched(tried: Project, baseline: Project) -> None:
    assert tried.git("status", "--short") == ""
    assert tried.read("dvc.lock") == baseline.read("dvc.lock")
    assert tried.metrics("scales") == baseline.metrics("scales")


def test_two_bits_from_the_start_pass_the_conversion_unharmed(tried: Project) -> None:
    tried.dvc("exp", "apply", "two-bits")
    try:
        metrics = tried.metrics("convert")
        assert tried.metrics("finetune")["best_kd"] == pytest.approx(metrics["kd_before"])
    finally:
        tried.git("reset", "--quiet", "--hard")
        tried.dvc("checkout")
    assert (metrics["converted"], metrics["kept"]) == (0, 14)
    # the directional form rounds other numbers to FP16, and nothing else changes
    assert metrics["kd_after"] == pytest.approx(metrics["kd_before"], rel=2e-3)


def test_the_table_reads_well(tried: Project) -> None:
    rows = table(tried)
    base, two_bits = rows["main"], rows["two-bits"]
    assert (base["quant.lut_size"], two_bits["quant.lut_size"]) == ("16", "4")
    for column in ("scales.best_kd", "finetune.best_kd", "convert.kd_after"):
        assert float(two_bits[column]) != float(base[column])
    assert len(base) <= 22
    assert not [name for name in base if "/" in name]


def test_the_queue_runs_one(baseline: Project, tmp_path: Path) -> None:
    project = baseline.copy(tmp_path / "lutqat")
    project.dvc("exp", "run", "--queue", "--set-param", "evaluate.new_tokens=4", "--name=short")
    project.dvc("queue", "start", "--jobs", "1")
    try:
        finished = time.monotonic() + 240
        while not ({"Success", "Failed"} & set(project.dvc("queue", "status").split())):
            assert time.monotonic() < finished, project.dvc("queue", "logs", "short")
            time.sleep(2)
        assert "Success" in project.dvc("queue", "status")
    finally:
        project.dvc("queue", "stop", "--kill", status=None)
    assert project.ran() == ["evaluate"]
    assert table(project)["short"]["evaluate.new_tokens"] == "4"
