"""One loader for every kind of model folder, and places that are never overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.base.errors import InputError
from lib.model.checkpoint import save_checkpoint
from lib.model.folders import check_replaceable, is_checkpoint, load_any
from lib.snap.snap import snap_model
from tests.model.reference_checkpoints import save_base
from tests.tiny_models import logits_of, quantized


def test_every_kind_of_folder(tmp_path: Path) -> None:
    base = save_base(tmp_path / "teacher")
    model, info = load_any(tmp_path / "teacher")
    assert not is_checkpoint(tmp_path / "teacher")
    assert info == {}
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    for baked in (None, False, True):
        model = quantized()
        if baked is not None:
            snap_model(model, baked=baked)
        folder = tmp_path / f"snap-{baked}"
        save_checkpoint(model, folder, tokenizer_from=tmp_path / "teacher", info={"stage": "x"})
        loaded, info = load_any(folder)
        assert is_checkpoint(folder)
        assert info == {"stage": "x"}
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, text in (("none", "does not exist"), ("file", "is a file"), (".", "holds no")):
        with pytest.raises(InputError, match=text):
            load_any(tmp_path / name)


def test_only_checkpoints_are_overwritten(tmp_path: Path) -> None:
    save_base(tmp_path / "teacher")
    save_checkpoint(quantized(), tmp_path / "ours", tokenizer_from=tmp_path / "teacher", info={})
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "ours"):
        check_replaceable(tmp_path / name)
    (tmp_path / "file").touch()
    for name in ("teacher", "file", "."):
        with pytest.raises(InputError, match="no lutqat checkpoint"):
            check_replaceable(tmp_path / name)
