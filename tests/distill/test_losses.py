"""Losses against full-logit references written in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.distill.losses import cross_entropy, hard_top1, kd_candidates, kd_tail

P, V = 7, 20


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(P, V, generator=torch.Generator().manual_seed(seed))


def full_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) over the whole vocabulary ``[P]``."""
    p, q = (x.div(temperature).log_softmax(dim=1) for x in (teacher, student))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


def candidates(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities at T = 1 and ids of the k most likely, ``[P, k]``."""
    return tuple(teacher.log_softmax(dim=1).topk(k, dim=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_kd_with_every_candidate_is_full_kd(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(True), logits(1)
    logprobs, ids = candidates(teacher, V)
    loss = kd_candidates(
        student.gather(1, ids), logprobs, torch.ones(P, V, dtype=torch.bool), temperature
    )
    slow = full_kd(student, teacher, temperature)
    assert torch.allclose(loss, slow, atol=1e-5)
    assert torch.allclose(gradient(loss, student), gradient(slow, student), atol=1e-5)


def test_kd_over_some_candidates_renormalizes_both_sides() -> None:
    student, teacher = logits(0), logits(1)
    logprobs, ids = candidates(teacher, 5)
    loss = kd_candidates(student.gather(1, ids), logprobs, torch.ones(P, 5, dtype=torch.bool), 2.0)
    slow = full_kd(student.gather(1, ids), teacher.gather(1, ids), 2.0)
    assert torch.allclose(loss, slow, atol=1e-5)
    assert not torch.allclose(loss, full_kd(student, teacher, 2.0), rtol=0.01)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unusable_candidates_do_not_count(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(True), logits(1)
    usable = torch.rand(P, V, generator=torch.Generator().manual_seed(2)) < 0.7
    usable[:, 0] = True
    loss = kd_candidates(student, teacher, usable, temperature)
    rows = [
        full_kd(student[i : i + 1, usable[i]], teacher[i : i + 1, usable[i]], temperature)
        for i in range(P)
    ]
    slow = torch.cat(rows)
    assert torch.allclose(loss, slow, atol=1e-5)
    found = gradient(loss, student)
    assert torch.allclose(found, gradient(slow, student), atol=1e-5)
    assert (found[~usable] == 0).all()


def test_gradients_do_not_vanish_with_temperature() -> None:
    """Hinton et al. 2015: T^2 keeps the size of the gradient; without it, it falls as 1 / T^2."""
    teacher, usable = logits(1), torch.ones(P, V, dtype=torch.bool)
    norms = []
    for temperature in (50.0, 100.0):
        student = logits(0).requires_grad_(True)
        norms.append(gradient(kd_candidates(student, teacher, usable, temperature), student).norm())
    assert norms[1] == pytest.approx(norms[0].item(), rel=0.05)
    # The limit: (z - mean z - (v - mean v)) / V, the matching of centered logits.
    difference = logits(0) - teacher
    limit = (difference - difference.mean(dim=1, keepdim=True)) / V
    assert norms[1] == pytest.approx(limit.norm().item(), rel=0.05)


def tail_kd(student: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    logprobs, ids = candidates(teacher, k)
    whole = teacher.log_softmax(dim=1)
    return kd_tail(
        student.gather(1, ids),
        (student / temperature).logsumexp(dim=1),
        logprobs,
        (whole / temperature).logsumexp(dim=1),
        torch.ones(P, k, dtype=torch.bool),
        temperature,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tail_of_one_token_is_full_kd(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(True), logits(1)
    loss = tail_kd(student, teacher, V - 1, temperature)
    slow = full_kd(student, teacher, temperature)
    assert torch.allclose(loss, slow, atol=1e-4)
    assert torch.allclose(gradient(loss, student), gradient(slow, student), atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_tail_is_one_class_that_completes_the_sum(k: int, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(True), logits(1)
    _, ids = candidates(teacher, k)

    def with_tail(values: Tensor) -> Tensor:
        p = values.div(temperature).softmax(dim=1)
        inside = p.gather(1, ids)
        rest = p.scatter(1, ids, 0.0).sum(dim=1, keepdim=True)
        classes = torch.cat([inside, rest], dim=1)
        assert torch.allclose(classes.sum(dim=1), torch.ones(P))
        return classes.log()

    slow = temperature**2 * F.kl_div(
        with_tail(student), with_tail(teacher), log_target=True, reduction="none"
    ).sum(dim=1)
    loss = tail_kd(student, teacher, k, temperature)
    assert torch.allclose(loss, slow, atol=1e-4)
    assert torch.allclose(gradient(loss, student), gradient(slow, student), atol=1e-3)
    assert (loss <= full_kd(student, teacher, temperature) + 1e-4).all()  # data processing


def test_tail_of_nothing_is_finite() -> None:
    student, teacher = logits(0).requires_grad_(True), logits(1)
    loss = tail_kd(student, teacher, V, 2.0)  # rounding may leave a sum above 1
    assert torch.allclose(loss, full_kd(student, teacher, 2.0), atol=1e-3)
    assert gradient(loss, student).isfinite().all()


def test_tail_leaves_unusable_candidates_to_the_rest() -> None:
    student, teacher = logits(0), logits(1)
    logprobs, ids = candidates(teacher, 4)
    doubled = torch.cat([ids, ids[:, :2]], dim=1)  # two negatives that are in the top k
    usable = torch.tensor([True] * 4 + [False] * 2).expand(P, 6)
    loss = kd_tail(
        student.gather(1, doubled),
        student.logsumexp(dim=1),
        torch.cat([logprobs, logprobs[:, :2]], dim=1),
        torch.zeros(P),
        usable,
        1.0,
    )
    assert torch.allclose(loss, tail_kd(student, teacher, 4, 1.0), atol=1e-5)


def test_kd_is_zero_on_the_teacher_itself() -> None:
    teacher, usable = logits(1), torch.ones(P, V, dtype=torch.bool)
    assert kd_candidates(teacher, teacher.log_softmax(dim=1), usable, 2.0).abs().max() < 1e-5
    assert tail_kd(teacher, teacher, 5, 2.0).abs().max() < 1e-4


def test_hard_top1_is_cross_entropy_inside_the_candidates() -> None:
    student = logits(0)
    usable = torch.ones(P, V, dtype=torch.bool)
    first = torch.zeros(P, dtype=torch.long)
    slow = F.cross_entropy(student, first, reduction="none")
    assert torch.allclose(hard_top1(student, usable), slow, atol=1e-6)
    usable[:, 10:] = False
    slow = F.cross_entropy(student[:, :10], first, reduction="none")
    assert torch.allclose(hard_top1(student, usable), slow, atol=1e-6)


def test_cross_entropy_from_its_ingredients() -> None:
    student, labels = logits(0), torch.arange(P)
    target = student.gather(1, labels[:, None]).squeeze(1)
    slow = F.cross_entropy(student, labels, reduction="none")
    assert torch.allclose(cross_entropy(student.logsumexp(dim=1), target), slow, atol=1e-6)
