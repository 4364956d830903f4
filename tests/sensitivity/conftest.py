"""One teacher cache for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import make_caches


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train`` (64 rows) and ``val`` (16 rows)."""
    return make_caches(tmp_path_factory.mktemp("cache"))
