"""Logits from hidden states, chunk by chunk, against the whole [P, V] product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lib.distill import head as head_module
from lib.distill.head import (
    candidate_logits,
    full_distillation,
    full_vocabulary,
    label_losses,
    shared_logits,
)

B, T, D, V = 2, 9, 6, 23
P = B * T


@pytest.fixture(params=[4, 6, P, 100])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sizes that do and do not divide the number of positions."""
    monkeypatch.setattr(head_module, "CHUNK", request.param)
    return int(request.param)


def tensors() -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(P, D, generator=generator).requires_grad_(True)
    return hidden, torch.randn(V, D, generator=generator), generator


@pytest.mark.usefixtures("chunk")
def test_candidate_logits() -> None:
    hidden, head, generator = tensors()
    ids = torch.randint(0, V, (P, 5), generator=generator)
    upstream = torch.randn(P, 5, generator=generator)
    fast, slow = candidate_logits(hidden, head, ids), (hidden @ head.T).gather(1, ids)
    assert torch.allclose(fast, slow, atol=1e-6)
    grads = [torch.autograd.grad((x * upstream).sum(), hidden)[0] for x in (fast, slow)]
    assert torch.allclose(*grads, atol=1e-5)


def test_shared_logits() -> None:
    hidden, head, generator = tensors()
    ids = torch.stack([torch.randperm(V, generator=generator)[:7] for _ in range(B)])
    fast = shared_logits(hidden.view(B, T, D), head, ids)
    slow = (hidden @ head.T).view(B, T, V).gather(2, ids[:, None, :].expand(B, T, 7))
    assert torch.allclose(fast, slow, atol=1e-6)
    grads = [torch.autograd.grad(x.square().sum(), hidden)[0] for x in (fast, slow)]
    assert torch.allclose(*grads, atol=1e-4)
    assert shared_logits(hidden.view(B, T, D), head, ids[:, :0]).shape == (B, T, 0)


@pytest.mark.usefixtures("chunk")
def test_full_vocabulary() -> None:
    hidden, head, generator = tensors()
    labels, top1 = torch.randint(0, V, (2, P), generator=generator)
    upstream = torch.randn(4, P, generator=generator)
    logits = hidden @ head.T
    slow = (
        logits.logsumexp(dim=1),
        (logits / 2.0).logsumexp(dim=1),
        logits.gather(1, labels[:, None]).squeeze(1),
        logits.gather(1, top1[:, None]).squeeze(1),
    )
    fast = full_vocabulary(hidden, head, labels, top1, 2.0)
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    grads = [
        torch.autograd.grad((torch.stack(tuple(x)) * upstream).sum(), hidden)[0]
        for x in (fast, slow)
    ]
    assert torch.allclose(*grads, atol=1e-5)


def test_no_chunk_holds_more_than_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = head_module._full_chunk

    def watched(hidden: Tensor, *rest: object) -> object:
        sizes.append(len(hidden))
        return whole(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(head_module, "CHUNK", 5)
    monkeypatch.setattr(head_module, "_full_chunk", watched)
    hidden, head, _ = tensors()
    ids = torch.zeros(P, dtype=torch.long)
    full_vocabulary(hidden, head, ids, ids, 1.0).logsumexp.sum().backward()
    assert max(sizes) == 5 and sum(sizes) == 2 * P  # recomputed once, in backward


def test_autocast_does_not_round_logits() -> None:
    hidden, head, generator = tensors()
    ids = torch.randint(0, V, (P, 5), generator=generator)
    shared = torch.randint(0, V, (B, 3), generator=generator)

    def compute() -> list[Tensor]:
        full = full_vocabulary(hidden, head, ids[:, 0], ids[:, 1], 2.0)
        return [
            candidate_logits(hidden, head, ids),
            shared_logits(hidden.view(B, T, D), head, shared),
            *full,
        ]

    plain = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compute()
        assert (hidden @ head.T).dtype == torch.bfloat16
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))
    low = candidate_logits(hidden.bfloat16(), head, ids)
    assert low.dtype == torch.float32


@pytest.mark.usefixtures("chunk")
def test_full_distillation() -> None:
    """Against the whole [P, V] of both models; the teacher's hidden size is its own."""
    hidden, head, generator = tensors()
    wide = torch.randn(P, D + 3, generator=generator).requires_grad_(True)
    teacher_head = torch.randn(V, D + 3, generator=generator)
    labels = torch.randint(0, V, (P,), generator=generator)
    upstream = torch.randn(3, P, generator=generator)
    logits, wanted = hidden @ head.T, (wide @ teacher_head.T).detach()
    t = 2.5
    kd = functional.kl_div(
        (logits / t).log_softmax(1), (wanted / t).log_softmax(1), log_target=True, reduction="none"
    )
    slow = (
        t**2 * kd.sum(dim=1),
        functional.cross_entropy(logits, labels, reduction="none"),
        functional.cross_entropy(logits, wanted.argmax(dim=1), reduction="none"),
    )
    fast = full_distillation(hidden, head, wide, teacher_head, labels, t)
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    grads = [
        torch.autograd.grad((torch.stack(tuple(x)) * upstream).sum(), hidden)[0]
        for x in (fast, slow)
    ]
    assert torch.allclose(*grads, atol=1e-4)
    assert wide.grad is None


@pytest.mark.usefixtures("chunk")
def test_label_losses() -> None:
    hidden, head, generator = tensors()
    labels = torch.randint(0, V, (P,), generator=generator)
    upstream = torch.randn(P, generator=generator)
    fast = label_losses(hidden, head, labels)
    slow = functional.cross_entropy(hidden @ head.T, labels, reduction="none")
    assert torch.allclose(fast, slow, atol=1e-5)
    grads = [torch.autograd.grad((x * upstream).sum(), hidden)[0] for x in (fast, slow)]
    assert torch.allclose(*grads, atol=1e-4)
