"""Folders that commands work on: a teacher, and what the Python API makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.api import load_teacher, quantize, save, snap
from tests.model.reference_checkpoints import save_base


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher``, ``trained`` (low-rank, with masters), ``snapped`` and ``baked``."""
    root = tmp_path_factory.mktemp("models")
    save_base(root / "teacher")
    teacher, tokenizer = load_teacher(root / "teacher")
    for name, form in (("trained", None), ("snapped", False), ("baked", True)):
        model = quantize(teacher, lut_size=4, rank=2, attention_lut_size=16)
        if form is not None:
            snap(model, baked=form)
        save(model, tokenizer, root / name)
    return root
