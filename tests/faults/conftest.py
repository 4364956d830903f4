"""One finished tiny pipeline for all faults; every test leaves it as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.workshop import Warm, Workshop
from tests.pipeline.project import Project


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("temporary"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def _workshop(baseline: Project, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop") / "lutqat"
    return Workshop(baseline.copy(folder).folder, warm, baseline.folder)


@pytest.fixture
def workshop(_workshop: Workshop) -> Iterator[Workshop]:
    """A copy of the finished pipeline in which stages run again and again."""
    yield _workshop
    _workshop.mend()


@pytest.fixture
def project(baseline: Project, tmp_path: Path) -> Project:
    """A copy for `dvc repro`."""
    return baseline.copy(tmp_path / "lutqat")
