"""Distillation losses over candidates, per position.

Shapes: P positions, C candidates (top-k first, then negatives). Every function returns ``[P]``.

Source: Hinton et al., "Distilling the knowledge in a neural network" (2015), section 2: the
gradients of softened targets scale as 1 / T^2, hence the factor T^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASKED = float("-inf")


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """sum_c p_c (log p_c - log q_c) from log-probabilities ``[P, C]``; p_c = 0 contributes 0."""
    # where() before the product: (-inf) - (-inf) would poison the gradient of masked classes
    absent = teacher == MASKED
    difference = torch.where(absent, 0.0, teacher) - torch.where(absent, 0.0, student)
    return (teacher.exp() * difference).sum(dim=1)


def kd_candidates(
    student_logits: Tensor, teacher_logprobs: Tensor, usable: Tensor, temperature: float
) -> Tensor:
    """T^2 KL(teacher || student), both renormalized over the usable candidates, at T.

    Args:
        student_logits, teacher_logprobs: ``[P, C]`` (any shift per position is immaterial).
        usable: bool ``[P, C]``; a negative that is also among the top k is not.
    """
    teacher = (teacher_logprobs / temperature).masked_fill(~usable, MASKED).log_softmax(dim=1)
    student = (student_logits / temperature).masked_fill(~usable, MASKED).log_softmax(dim=1)
    return temperature**2 * _kl(teacher, student)


def kd_tail(
    student_logits: Tensor,
    student_scaled_logsumexp: Tensor,
    teacher_logprobs: Tensor,
    teacher_scaled_logsumexp: Tensor,
    usable: Tensor,
    temperature: float,
) -> Tensor:
    """T^2 KL over the candidates and one class for the rest of the vocabulary, at T.

    Args:
        student_logits, teacher_logprobs: ``[P, C]``.
        student_scaled_logsumexp, teacher_scaled_logsumexp: ``[P]``, log-sum-exp over the *whole*
            vocabulary of the same quantity divided by T.
    """

    def with_tail(values: Tensor, logsumexp: Tensor) -> Tensor:
        inside = (values / temperature - logsumexp[:, None]).masked_fill(~usable, MASKED)
        # 1 - sum(p) in float32 can round to 0 or below: floored at the resolution of float32
        rest = (1 - inside.exp().sum(dim=1)).clamp_min(torch.finfo(torch.float32).eps)
        return torch.cat([inside, rest.log()[:, None]], dim=1)

    teacher = with_tail(teacher_logprobs, teacher_scaled_logsumexp)
    student = with_tail(student_logits, student_scaled_logsumexp)
    return temperature**2 * _kl(teacher, student)


def hard_top1(student_logits: Tensor, usable: Tensor) -> Tensor:
    """Cross-entropy against the teacher's first choice (candidate 0) inside the candidates."""
    return -student_logits.masked_fill(~usable, MASKED).log_softmax(dim=1)[:, 0]


def cross_entropy(logsumexp: Tensor, target_logit: Tensor) -> Tensor:
    """Full-vocabulary cross-entropy ``[P]`` from its two ingredients."""
    return logsumexp - target_logit
