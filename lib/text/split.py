"""Which documents are trained on, which choose the best step, and which only measure."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def split_of(title: str, val_fraction: float, test_fraction: float) -> Split:
    """The split of a document, decided by a hash of its title alone.

    So a title is in one split whatever source, seed or machine it comes with, and raising
    ``val_fraction`` never moves a test document.
    """
    digest = hashlib.sha256(canonical(title).encode()).digest()
    position = int.from_bytes(digest[:8]) / 2**64
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def canonical(title: str) -> str:
    """Titles that differ in case or white space only are the same."""
    return " ".join(title.casefold().split())
