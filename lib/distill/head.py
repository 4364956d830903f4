"""Logits where a loss needs them, straight from hidden states, never the whole [P, V].

Shapes: hidden H ``[P, D]``, head E ``[V, D]`` (frozen), candidate ids ``[P, K]``,
shared ids ``[B, R]`` for P = B * T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # positions at a time; bounds a chunk's memory to CHUNK * V floats


class _CandidateLogits(torch.autograd.Function):
    """``einsum('pd,pkd->pk', H, E[ids])`` that keeps the ids, not the gathered rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(head, ids)
        parts = [
            torch.bmm(head[i], h.unsqueeze(2)).squeeze(2)
            for h, i in zip(hidden.split(CHUNK), ids.split(CHUNK), strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        head, ids = ctx.saved_tensors
        parts = [
            torch.bmm(g.unsqueeze(1), head[i]).squeeze(1)
            for g, i in zip(grads[0].split(CHUNK), ids.split(CHUNK), strict=True)
        ]
        return torch.cat(parts), None, None


def candidate_logits(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Logits of each position's own candidates: ``[P, D], [V, D], [P, K] -> [P, K]`` float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _CandidateLogits.apply(hidden.float(), head, ids)


def shared_logits(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Logits of candidates shared by a sequence: ``[B, T, D], [V, D], [B, R] -> [B, T, R]``."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.bmm(hidden.float(), head[ids].transpose(1, 2))


def _chunked(chunk: Callable[..., tuple[Tensor, ...]], *each: Tensor) -> tuple[Tensor, ...]:
    """What ``chunk`` makes of so many positions at a time, joined; recomputed in backward.

    Args:
        each: ``[P, ...]``, cut alike.
    """
    with torch.autocast(each[0].device.type, enabled=False):
        parts = [
            checkpoint(chunk, *some, use_reentrant=False)
            for some in zip(*(values.split(CHUNK) for values in each), strict=True)
        ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class FullVocabulary(NamedTuple):
    """What the losses over the whole vocabulary need, each ``[P]``."""

    logsumexp: Tensor  # at temperature 1
    scaled_logsumexp: Tensor  # of logits / T
    label_logit: Tensor
    top1_logit: Tensor


def _full_chunk(
    hidden: Tensor, head: Tensor, labels: Tensor, top1: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = hidden @ head.T
    return (
        logits.logsumexp(dim=1),
        (logits / temperature).logsumexp(dim=1),
        logits.gather(1, labels[:, None]).squeeze(1),
        logits.gather(1, top1[:, None]).squeeze(1),
    )


def full_vocabulary(
    hidden: Tensor, head: Tensor, labels: Tensor, top1: Tensor, temperature: float
) -> FullVocabulary:
    """Log-sum-exps and two logits per position, chunk by chunk, recomputed in backward.

    Args:
        hidden: ``[P, D]``; head: ``[V, D]``; labels, top1: ids ``[P]``.
    """

    def chunk(h: Tensor, label: Tensor, best: Tensor) -> tuple[Tensor, ...]:
        return _full_chunk(h, head, label, best, temperature)

    return FullVocabulary(*_chunked(chunk, hidden.float(), labels, top1))


class FullDistillation(NamedTuple):
    """Losses over the whole vocabulary with the teacher at hand, each ``[P]``."""

    kd: Tensor  # T^2 KL(teacher || student) at T
    label: Tensor  # cross entropy on the labels
    top1: Tensor  # cross entropy on the teacher's first choice


def _distillation_chunk(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ head.T
    wanted = teacher_hidden @ teacher_head.T
    teacher = (wanted / temperature).log_softmax(dim=1)
    student = (logits / temperature).log_softmax(dim=1)
    kd = temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=1)
    total = logits.logsumexp(dim=1)
    best = wanted.argmax(dim=1, keepdim=True)
    return (
        kd,
        total - logits.gather(1, labels[:, None]).squeeze(1),
        total - logits.gather(1, best).squeeze(1),
    )


def full_distillation(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    temperature: float,
) -> FullDistillation:
    """Both models' logits chunk by chunk, recomputed in backward; the teacher gets no gradient.

    Args:
        hidden: ``[P, D]``; head: ``[V, D]``; teacher_hidden: ``[P, D_t]``; teacher_head:
            ``[V, D_t]``; labels: ids ``[P]``.
    """

    def chunk(h: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return _distillation_chunk(h, head, t, teacher_head, label, temperature)

    wanted = teacher_hidden.detach().float()
    return FullDistillation(*_chunked(chunk, hidden.float(), wanted, labels))


def _sampled_chunk(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    weights: Tensor,
    labels: Tensor,
    top1: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ head.T
    scaled = (logits / temperature).logsumexp(dim=1, keepdim=True)
    student = logits.gather(1, ids) / temperature - scaled
    kd = temperature**2 * (weights * (logprobs - student)).sum(dim=1)
    total = logits.logsumexp(dim=1)
    return (
        kd,
        total - logits.gather(1, labels[:, None]).squeeze(1),
        total - logits.gather(1, top1[:, None]).squeeze(1),
    )


def sampled_distillation(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    weights: Tensor,
    labels: Tensor,
    top1: Tensor,
    temperature: float,
) -> FullDistillation:
    """As :func:`full_distillation`, from K ids of each position instead of the teacher's logits:
    ``kd = T^2 sum_k w_k (log p_k - log s_k)``, s the student's softmax over the whole vocabulary.

    With weights as :func:`lib.distill.sampling.importance_weights` gives them, kd and its gradient
    are unbiased estimates of T^2 KL(teacher || student) and of its gradient.

    Args:
        hidden: ``[P, D]``; head: ``[V, D]``; ids ``[P, K]``, with the teacher's log-probabilities
            at T and weights; labels, top1: ids ``[P]``.
    """

    def chunk(
        h: Tensor, i: Tensor, logp: Tensor, w: Tensor, label: Tensor, best: Tensor
    ) -> tuple[Tensor, ...]:
        return _sampled_chunk(h, head, i, logp, w, label, best, temperature)

    each = (hidden.float(), ids, logprobs, weights, labels, top1)
    return FullDistillation(*_chunked(chunk, *each))


def label_losses(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy ``[P]`` on the labels ``[P]``, chunk by chunk, recomputed in backward."""

    def chunk(h: Tensor, label: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(h @ head.T, label, reduction="none"),)

    (losses,) = _chunked(chunk, hidden.float(), labels)
    return losses
