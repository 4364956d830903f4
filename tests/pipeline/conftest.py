"""The tiny pipeline, run once for all tests here; each test works on its own copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.project import Project, make_project


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished, committed pipeline; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("baseline") / "lutqat")
    project.dvc("repro")
    project.commit("results")
    return project


@pytest.fixture
def project(baseline: Project, tmp_path: Path) -> Project:
    """A copy of the finished pipeline, to be changed."""
    return baseline.copy(tmp_path / "lutqat")
