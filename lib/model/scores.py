"""Sensitivity scores, ``{layer name: score}``: what the stage `sensitivity` writes and others read.

A name is that of a quantized layer (``model.layers.3.mlp.up_proj``), or of a whole decoder block
(``model.layers.3``) where only blocks have scores. A higher score means a more sensitive layer.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from lib.base.errors import InputError, MismatchError
from lib.base.files import read_json
from lib.model.surgery import block_number


def block_of(name: str) -> int:
    """Index of the decoder block that a scored name belongs to, or is.

    Raises:
        InputError: the name has no ``.layers.N`` part.
    """
    return block_number(f"{name}.")


def by_kind(scores: dict[str, float]) -> dict[str, dict[int, float]]:
    """Projection kind (``up_proj``) -> block -> score, where layers have scores of their own."""
    kinds: dict[str, dict[int, float]] = {}
    for name, score in scores.items():
        kind = name.rsplit(".", 1)[-1]
        if not kind.isdigit():
            kinds.setdefault(kind, {})[block_of(name)] = score
    return kinds


def score_of(value: Any, what: str, where: Path) -> float:
    """A JSON value as a score.

    Args:
        what: whose score it is; where: the file it stands in.

    Raises:
        InputError: it is no number, or not a finite one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {what} is {value!r}, not a number; correct it")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{where}: {what} is {number}; scores must be finite, correct it")
    return number


def checked_scores(values: Any, where: Path) -> dict[str, float]:
    """``values`` as scores, in their order.

    Raises:
        InputError: no object, an empty one, a name outside the decoder blocks, or no finite number.
    """
    if not isinstance(values, dict) or not values:
        raise InputError(f"{where} holds no scores by layer name; rerun the stage sensitivity")
    try:
        for name in values:
            block_of(name)
    except InputError as error:
        raise InputError(f"{where}: {error}; correct it, or rerun the stage sensitivity") from None
    return {name: score_of(value, f"the score of {name}", where) for name, value in values.items()}


def read_scores(path: Path) -> dict[str, float]:
    """The scores of a ``scores.json``, in the model's order.

    Raises:
        InputError: no such file, or see :func:`checked_scores`. CorruptError: it is not JSON.
    """
    return checked_scores(read_json(path), path)


def block_scores(scores: dict[str, float], blocks: int) -> list[float]:
    """Score of each decoder block: the mean of its layers' (a plain one, whatever their sizes).

    Args:
        blocks: number of decoder blocks of the model.

    Raises:
        MismatchError: a block has no score, or a score belongs to a block beyond the last.
    """
    found: list[list[float]] = [[] for _ in range(blocks)]
    for name, score in scores.items():
        block = block_of(name)
        if block >= blocks:
            raise MismatchError(
                f"there is a score of {name}, but the model has {blocks} decoder blocks; use "
                "scores of this model"
            )
        found[block].append(score)
    for block, values in enumerate(found):
        if not values:
            raise MismatchError(
                f"decoder block {block} of {blocks} has no score; use scores of this model"
            )
    return [fmean(values) for values in found]
