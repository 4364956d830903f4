"""What adapters learn from, by the mode of the section `recover`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.base.errors import InputError
from lib.cache.shards import CacheReader
from lib.objective.live import AnswerBatches, TextBatches, TextObjective
from lib.objective.loss import Batches, Loss
from lib.params.recover import Recover
from lib.params.training import Distill
from lib.train.run import lesson_of, objective_of
from lib.train.source import LiveTeacher, check_teacher, text_of


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A loss, judged by the cached KD term in every mode, and what it is taken on."""

    loss: Loss
    train: Batches
    val: CacheReader
    identity: dict[str, Any]
    """Fingerprints of the data."""
    length: int
    """Tokens of a training sequence."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the data of a lesson lie."""

    teacher: Path
    cache: Path
    tokens: Path


def make_lesson(
    params: Recover,
    distill: Distill,
    folders: Folders,
    expect: dict[str, Any],
    device: torch.device,
) -> Lesson:
    """The lesson of ``params.mode``. Only mode `kd` brings the teacher into memory.

    Args:
        expect: fingerprint of the model's ``teacher``, and its ``vocab_size``.

    Raises:
        MismatchError: cache, tokens, teacher and model do not belong together.
        InputError: answers are to be learned, and no row has a prompt.
        ParamsError: a term needs candidates, and the cache has none.
    """
    val = CacheReader(folders.cache / "val", expect)
    if params.mode == "kd_cache":
        train = CacheReader(folders.cache / "train", expect)
        identity = {"train": train.fingerprint, "val": val.fingerprint}
        loss, cached = lesson_of(params, distill, train, val)
        return Lesson(
            loss=loss, train=cached, val=val, identity=identity, length=train.spec.max_length
        )
    check_teacher(folders.teacher, expect["teacher"])
    rows = text_of(folders.tokens, folders.teacher)
    judge = objective_of(params, distill, val)
    text: Loss = TextObjective(held_out=judge)
    batches = TextBatches(rows)
    if params.mode == "kd":
        live = LiveTeacher(teacher=folders.teacher, tokens=folders.tokens)
        text, batches = live.load(params, distill, judge, device)
    if params.mode == "sft":
        if not rows.prompt.any():
            raise InputError(
                f"no row of {folders.tokens} has a prompt, and recover.mode sft learns what "
                "follows prompts; add a source of format alpaca or alpaca_chat, or set the mode to "
                "text"
            )
        batches = AnswerBatches(rows)
    return Lesson(
        loss=text,
        train=batches,
        val=val,
        identity={"train": rows.meta["fingerprint"], "val": val.fingerprint},
        length=rows.input_ids.shape[1],
    )
