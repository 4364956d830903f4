"""A finished model to recover, and one short run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lib.model.checkpoint import save_checkpoint
from lib.model.load import folder_fingerprint, tokenizer_fingerprint
from lib.params.data import Run
from lib.params.recover import Recover
from lib.params.training import Distill
from lib.recover.lesson import Folders
from lib.recover.run import recover_stage
from lib.snap.snap import snap_model
from lib.text.sequences import write_tokens
from lib.train.state import Progress
from tests.tiny_models import VOCAB, make_place, quantized, random_rows


def make_snapped(folder: Path, *, baked: bool = False, **changes: Any) -> None:
    """``folder/snap``, of the teacher in ``folder``, coarse enough that there is much to win."""
    model = quantized(**{"lut_size": 4, **changes})
    snap_model(model, baked=baked)
    info = {"stage": "snap", "teacher": folder_fingerprint(folder / "teacher")}
    save_checkpoint(model, folder / "snap", tokenizer_from=folder / "teacher", info=info, half=True)


def write_rows(folder: Path, teacher: Path, *, prompts: bool) -> None:
    """``folder/train``; the first half of every row is a prompt."""
    rows = random_rows(32, "train", 0)
    asked = np.zeros(rows.input_ids.shape, dtype=bool)
    asked[:, : asked.shape[1] // 2] = prompts
    write_tokens(
        folder / "train",
        rows.input_ids,
        rows.lengths,
        asked,
        split="train",
        vocab_size=VOCAB,
        pad_id=0,
        tokenizer=tokenizer_fingerprint(teacher),
    )


def make_recovery(folder: Path) -> Path:
    """``teacher``, ``cache``, ``tokens`` with prompts and ``snap``."""
    make_place(folder)
    write_rows(folder / "tokens", folder / "teacher", prompts=True)
    make_snapped(folder)
    return folder


def section(**changes: Any) -> Recover:
    """Six steps of eight sequences."""
    values: dict[str, Any] = {
        "steps": 6,
        "batch_size": 8,
        "rank": 4,
        "rate": 1e-2,
        "eval_every": 2,
        "eval_sequences": 16,
        "checkpoint_every": 2,
    }
    return Recover(**{**values, **changes})


def recover(place: Path, out: Path, tokens: str = "tokens", **changes: Any) -> Progress:
    """Train adapters on ``place/snap``."""
    folders = Folders(teacher=place / "teacher", cache=place / "cache", tokens=place / tokens)
    return recover_stage(
        place / "snap",
        folders,
        out,
        params=section(**changes),
        distill=Distill(),
        run=Run(device="cpu", log_every=1),
        declared=str(sorted(changes.items())),
    )
