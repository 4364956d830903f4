"""One thread for every test: tiny models gain nothing from more, and sums keep one order.

And the tiny pipeline, run once for all tests that need it.
"""

from __future__ import annotations

import pytest
import torch

from tests.pipeline.project import Project, make_project

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished, committed pipeline; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("baseline") / "lutqat")
    project.dvc("repro")
    project.commit("results")
    return project
