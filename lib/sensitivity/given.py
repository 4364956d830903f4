"""Scores from a file: the form that block-wise trainers publish, or a scores.json of ours.

The published form has one score per decoder block, and more that is not needed here:

    {"model": {"name": "...", "num_layers": 32}, "method": "fisher",
     "sensitivity_scores": [0.12, ...], "ranked_layers": [...], "statistics": {...}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.base.files import read_json
from lib.model.blocks import block_prefix, decoder_blocks
from lib.model.scores import block_scores, checked_scores, score_of
from lib.model.surgery import projections

KEY = "sensitivity_scores"


def block_names(model: PreTrainedModel) -> list[str]:
    """Names of the decoder blocks, ``model.layers.0`` and so on."""
    count = len(decoder_blocks(model))
    return [block_prefix(model, number).removesuffix(".") for number in range(count)]


def given_scores(path: Path, model: PreTrainedModel) -> dict[str, float]:
    """The scores of a file for ``model``: by layer if it has them, by decoder block if not.

    Raises:
        InputError: no such file, no JSON, no scores in it, or one that is no finite number.
        MismatchError: the scores are another model's.
    """
    values = _read(path)
    blocks = block_names(model)
    if isinstance(values, dict) and KEY in values:
        return dict(zip(blocks, _published(values, len(blocks), path), strict=True))
    if not (isinstance(values, dict) and values and all(".layers." in name for name in values)):
        raise InputError(
            f"sensitivity.file {path} has no key {KEY}; give a file that has, with one number per "
            "decoder block, or a scores.json of the stage sensitivity"
        )
    scores = checked_scores(values, path)
    known = {*blocks, *projections(model)}
    for name in scores:
        if name not in known:
            raise MismatchError(
                f"sensitivity.file {path} has a score of {name}, which this model does not have; "
                "use scores of this model"
            )
    block_scores(scores, len(blocks))
    return scores


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(
            f"sensitivity.file {path} is not a file here; give a path from the root of the "
            "repository, data/local/scores.json say"
        )
    try:
        return read_json(path)
    except CorruptError:
        raise InputError(
            f"sensitivity.file {path} is not JSON; mend it, or set sensitivity.method to fisher"
        ) from None


def _published(values: dict[str, Any], blocks: int, path: Path) -> list[float]:
    """One score per decoder block."""
    scores = values[KEY]
    if not isinstance(scores, list):
        raise InputError(
            f"sensitivity.file {path}: {KEY} is not a list; it must hold one number per decoder "
            "block"
        )
    about = values.get("model")
    layers = about.get("num_layers", blocks) if isinstance(about, dict) else blocks
    for what, count in (("model.num_layers", layers), (f"length of {KEY}", len(scores))):
        if count != blocks:
            raise MismatchError(
                f"sensitivity.file {path}: {what} is {count}, but the teacher has {blocks} decoder "
                "blocks; use scores of this model"
            )
    return [score_of(score, f"{KEY}[{block}]", path) for block, score in enumerate(scores)]
