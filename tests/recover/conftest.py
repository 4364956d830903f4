"""One place for all tests of this package, and scratch folders of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recover.samples import make_recovery


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher``, ``cache``, ``tokens`` and ``snap``; not to be changed."""
    return make_recovery(tmp_path_factory.mktemp("recovery"))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scratch folders go."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    return tmp_path / "root"
