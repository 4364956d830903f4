"""A teacher and a training split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib.model.tiny import VOCABULARY, random_teacher
from lib.text.sequences import write_tokens

ROWS = 22


def make_place(folder: Path, seed: int = 0) -> Path:
    """``teacher`` and ``train`` in ``folder``; returns it."""
    model, tokenizer = random_teacher("llama", seed=seed)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    generator = np.random.default_rng(0)
    write_tokens(
        folder / "train",
        generator.integers(3, 250, (ROWS, 16)).astype(np.int32),
        generator.integers(5, 17, ROWS).astype(np.int32),
        split="train",
        vocab_size=VOCABULARY,
        pad_id=0,
        tokenizer="tiny",
    )
    return folder
