"""KL divergence and top-1 agreement with the teacher on held-out sequences.

The teacher runs once. Its last hidden states are kept ([P, D] floats, some hundred times smaller
than the logits) and its head is applied again to each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.base.progress import track
from lib.distill.compare import Agreement

TOKENS_PER_BATCH = 512  # logits of a batch are alive at once: 512 * vocabulary floats


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: ids and mask ``[B, L]``; ``scored [B, L]`` marks positions whose
    next token is real."""

    ids: Tensor
    mask: Tensor
    scored: Tensor


def make_batches(input_ids: np.ndarray, lengths: np.ndarray) -> list[Batch]:
    """Split ``[N, L]`` ids with ``[N]`` real lengths into batches of about 512 tokens.

    Raises:
        InputError: nothing to score (no sequence has two real tokens).
    """
    if not len(lengths) or int(lengths.max()) < 2:
        raise InputError("agreement needs a sequence of at least 2 tokens; the test split has none")
    size = max(1, TOKENS_PER_BATCH // input_ids.shape[1])
    batches = []
    for start in range(0, len(lengths), size):
        ids = torch.from_numpy(np.asarray(input_ids[start : start + size], dtype=np.int64))
        real = torch.from_numpy(np.asarray(lengths[start : start + size], dtype=np.int64))
        position = torch.arange(ids.shape[1])
        mask = position < real[:, None]
        batches.append(Batch(ids=ids, mask=mask, scored=position + 1 < real[:, None]))
    return batches


class TeacherTarget:
    """The teacher's predictions on some sequences, ready to be compared with.

    Args:
        teacher: any causal LM whose logits are its head applied to its last hidden state.
        input_ids, lengths: ``[N, L]`` and ``[N]``; right padding is not scored.

    Raises:
        InputError: nothing to score, or logits that are more than the head's output.
    """

    @torch.no_grad()
    def __init__(
        self, teacher: PreTrainedModel, input_ids: np.ndarray, lengths: np.ndarray
    ) -> None:
        teacher.eval()
        head = teacher.get_output_embeddings()
        assert isinstance(head, nn.Module)
        self.head = head
        self.batches = make_batches(input_ids, lengths)
        self.hidden: list[Tensor] = []  # per batch [scored positions, D]
        for batch in track(self.batches, len(self.batches), "teacher: batches"):
            hidden, logits = _forward(teacher, head, batch)
            again = head(hidden[:1])
            if not torch.allclose(again, logits[:1], rtol=1e-3, atol=1e-3):
                raise InputError(
                    f"{type(teacher).__name__} changes its logits after the output layer "
                    "(soft-capping or scaling); agreement with such a teacher is not supported"
                )
            self.hidden.append(hidden)

    @torch.no_grad()
    def compare(self, student: PreTrainedModel, label: str = "agreement") -> Agreement:
        """KL(teacher || student) and top-1 agreement over every scored position.

        Raises:
            MismatchError: another vocabulary.
        """
        student.eval()
        agreement = Agreement()
        pairs = list(zip(self.batches, self.hidden, strict=True))
        for batch, hidden in track(pairs, len(pairs), label):
            logits = _logits(student, batch)
            expected = self.head(hidden)
            if logits.shape[1] != expected.shape[1]:
                raise MismatchError(
                    f"the model has {logits.shape[1]} output tokens, the teacher "
                    f"{expected.shape[1]}; compare models of one vocabulary"
                )
            agreement.add(logits, expected)
        return agreement


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """``[scored positions, V]``."""
    logits = model(
        input_ids=batch.ids.to(model.device),
        attention_mask=batch.mask.to(model.device),
        use_cache=False,
    ).logits
    return logits[batch.scored.to(model.device)]


def _forward(model: PreTrainedModel, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(hidden states before the head ``[P, D]``, logits ``[P, V]``) of the scored positions."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = head.register_forward_pre_hook(keep)
    try:
        logits = _logits(model, batch)
    finally:
        handle.remove()
    return seen[0][batch.scored.to(model.device)], logits
