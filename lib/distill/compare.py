"""How far one model's predictions are from another's: full-vocabulary KL and top-1 agreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROWS_PER_CHUNK = 256
"""Positions compared at a time, so that only a few [rows, vocabulary] tensors are alive."""


@dataclass
class Agreement:
    """Running sums over positions; the means are properties.

    ``kl`` is mean KL(reference || candidate) in nats per position, ``top1`` the share of positions
    where both models' most probable token is the same.
    """

    positions: int = 0
    kl_sum: float = 0.0
    same_top1: int = 0

    @property
    def kl(self) -> float:
        return self.kl_sum / self.positions

    @property
    def top1(self) -> float:
        return self.same_top1 / self.positions

    def add(self, candidate: torch.Tensor, reference: torch.Tensor) -> None:
        """Take in logits [positions, vocabulary] of both models, in the same order."""
        for start in range(0, reference.shape[0], ROWS_PER_CHUNK):
            chunk = slice(start, start + ROWS_PER_CHUNK)
            ours, theirs = candidate[chunk].float(), reference[chunk].float()
            log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
            self.kl_sum += float(divergence.sum())
            self.same_top1 += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.positions += ours.shape[0]
