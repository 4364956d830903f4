"""Each test works on its own copy of the finished tiny pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.project import Project


@pytest.fixture
def project(baseline: Project, tmp_path: Path) -> Project:
    """A copy of the finished pipeline, to be changed."""
    return baseline.copy(tmp_path / "lutqat")
