"""Any model folder: a teacher (Hugging Face) or a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lib.base.errors import InputError
from lib.base.files import read_json
from lib.model.checkpoint import CONFIG, FORMAT, load_checkpoint
from lib.model.load import load_causal_lm


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours; False where it is something else or missing.

    Raises:
        CorruptError: its ``config.json`` is damaged.
    """
    if not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG)
    return isinstance(config, dict) and config.get("format") == FORMAT


def load_any(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model (float32, CPU, eval mode) of a teacher, training, snapped or baked folder, and the
    checkpoint's ``info`` (empty for a teacher).

    Raises:
        InputError, CorruptError, MismatchError: as for :func:`lib.model.checkpoint.load_checkpoint`
            and :func:`lib.model.load.load_causal_lm`.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"{folder} {what}; give a checkpoint folder (runs/STAGE/model) or a teacher folder"
        )
    if is_checkpoint(folder):
        return load_checkpoint(folder)
    return load_causal_lm(folder), {}


def check_replaceable(folder: Path) -> None:
    """Refuse a place whose content would be lost: only a checkpoint of ours may be overwritten.

    Raises:
        InputError: there is a file or a folder of something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_checkpoint(folder):
        raise InputError(f"{folder} exists and is no lutqat checkpoint; give a new folder")
