"""What a training stage learns from: the teacher's cache, or the teacher itself on text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.base.errors import MismatchError
from lib.model.load import folder_fingerprint, load_causal_lm, tokenizer_fingerprint
from lib.objective.distillation import Objective
from lib.objective.live import LiveObjective, TextBatches
from lib.params.training import Distill, LoopConfig
from lib.text.sequences import TokenSet


def check_teacher(folder: Path, teacher: str) -> None:
    """Check that the model in ``folder`` is the one with the fingerprint ``teacher``.

    Raises:
        MismatchError: it is another one.
    """
    found = folder_fingerprint(folder)
    if found != teacher:
        raise MismatchError(
            f"{folder} is not the teacher that the model comes from (its fingerprint is "
            f"{found}, the model's says {teacher}); rerun the stages in between"
        )


def frozen_teacher(folder: Path, device: torch.device) -> PreTrainedModel:
    """The teacher, ready to be asked."""
    model = load_causal_lm(folder)
    model.requires_grad_(False)
    model.eval()
    return model.to(device)  # type: ignore[arg-type]


def text_of(tokens: Path, teacher: Path) -> TokenSet:
    """Training rows made with the teacher's tokenizer.

    Raises:
        MismatchError: another tokenizer made them.
    """
    rows = TokenSet(tokens / "train")
    mark = tokenizer_fingerprint(teacher)
    if rows.meta["tokenizer"] != mark:
        raise MismatchError(
            f"{tokens} was made with the tokenizer {rows.meta['tokenizer']}, {teacher} has {mark}; "
            "rerun the tokens stage with this teacher"
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class LiveTeacher:
    """The folders that training without a cache of its text needs."""

    teacher: Path
    tokens: Path

    def identity(self, teacher: str) -> dict[str, Any]:
        """What defines such a run beside its params.

        Raises:
            MismatchError: teacher, tokens and model do not belong together.
        """
        check_teacher(self.teacher, teacher)
        return {"text": text_of(self.tokens, self.teacher).meta["fingerprint"]}

    def load(
        self, params: LoopConfig, distill: Distill, held_out: Objective, device: torch.device
    ) -> tuple[LiveObjective, TextBatches]:
        """The loss and the sequences."""
        objective = LiveObjective(
            teacher=frozen_teacher(self.teacher, device),
            held_out=held_out,
            temperature=distill.temperature,
            distill_weight=params.distill_weight,
            hard_full_weight=params.hard_full_weight,
        )
        return objective, TextBatches(text_of(self.tokens, self.teacher))


def live_teacher(distill: Distill, teacher: Path, tokens: Path) -> LiveTeacher | None:
    """What `distill.source` asks for; None where the cache serves."""
    return LiveTeacher(teacher=teacher, tokens=tokens) if distill.source == "teacher" else None
