"""Drawn targets: unbiased, each id once, and the loss on them against the whole vocabulary."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lib.distill import head as head_module
from lib.distill.head import FullDistillation, sampled_distillation
from lib.distill.sampling import draw, importance_weights

V, K, D, DRAWS, T = 60, 9, 6, 4000, 2.0
POWERS = pytest.mark.parametrize("power", [1.0, 0.5])


def teacher(seed: int = 0, spread: float = 3.0) -> Tensor:
    """log p ``[V]``: a few likely ids and a long tail, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(V, generator=generator, dtype=torch.float64)).log_softmax(0)


def shifts(count: int = DRAWS) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1))


def slow_threshold(logprobs: Tensor, power: float) -> float:
    """h with ``sum min(1, p^t / h) = K``, by bisection of its logarithm."""
    mass = (power * logprobs).exp().tolist()
    low, high = -700.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(min(1.0, value / math.exp(middle)) for value in mass)
        low, high = (middle, high) if total > K else (low, middle)
    return math.exp(low)


@POWERS
def test_an_id_is_drawn_as_often_as_the_proposal_says(power: float) -> None:
    """On a grid of shifts an id is drawn within one of M times its probability."""
    logprobs, h = teacher(), slow_threshold(teacher(), power)
    grid = (torch.arange(DRAWS) + 0.5) / DRAWS
    drawn = draw(logprobs.expand(DRAWS, V), grid, K, power)
    often = torch.bincount(drawn.ids.flatten(), minlength=V) / DRAWS
    inclusion = ((power * logprobs).exp() / h).clamp(max=1)
    assert float((often - inclusion).abs().max()) < 2 / DRAWS
    assert 0 < int((inclusion == 1).sum()) < K  # some are certain, some are not
    assert drawn.threshold.exp().tolist() == pytest.approx([h] * DRAWS, rel=1e-9)


@given(
    count=st.integers(1, 12),
    power=st.sampled_from([1.0, 0.3]),
    spread=st.sampled_from([0.0, 1.0, 30.0, 2000.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_ids_are_distinct_and_known_whatever_the_distribution(
    count: int, power: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(5, 12, generator=generator)
    logprobs = logits.log_softmax(dim=1)
    shift = torch.tensor([0.0, 1 - 2**-24, *torch.rand(3, generator=generator).tolist()])
    drawn = draw(logprobs, shift, count, power)
    assert drawn.ids.shape == (5, count)
    assert bool((drawn.ids.diff(dim=1) > 0).all())
    assert int(drawn.ids.min()) >= 0 and int(drawn.ids.max()) < 12
    weights = importance_weights(logprobs.gather(1, drawn.ids), drawn.threshold.float(), power)
    assert bool(weights.isfinite().all() & (weights >= 0).all())


def test_a_row_does_not_know_its_batch() -> None:
    logprobs = torch.stack([teacher(seed, seed + 1.0) for seed in range(7)]).float()
    together = draw(logprobs, shifts(7), K, 0.8)
    for row in range(7):
        alone = draw(logprobs[row : row + 1], shifts(7)[row : row + 1], K, 0.8)
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.threshold[0], together.threshold[row])


def weighted(logprobs: Tensor, power: float, count: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Ids and weights of so many draws of K."""
    drawn = draw(logprobs.expand(count, V), shifts(count), K, power)
    return drawn.ids, importance_weights(logprobs[drawn.ids], drawn.threshold, power)


def test_weights_sum_to_one() -> None:
    _, weights = weighted(teacher(), 1.0)
    assert torch.allclose(weights.sum(dim=1), torch.ones(DRAWS, dtype=torch.float64), atol=1e-12)
    sums = weighted(teacher(), 0.5)[1].sum(dim=1)
    error = float(sums.std()) / math.sqrt(DRAWS)
    assert error > 0 and abs(float(sums.mean()) - 1) < 5 * error


@POWERS
def test_all_ids_weigh_what_they_are(power: float) -> None:
    logprobs = teacher()[None]
    drawn = draw(logprobs, shifts(1), V, power)
    assert drawn.ids[0].tolist() == list(range(V))
    weights = importance_weights(logprobs, drawn.threshold, power)
    assert torch.allclose(weights, logprobs.exp(), rtol=1e-12)


# --- the gradient in the mean --------------------------------------------------------------------


def student() -> tuple[Tensor, Tensor]:
    """Hidden state ``[D]`` and head ``[V, D]``."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(D, generator=generator), torch.randn(V, D, generator=generator)


def full_gradient(logprobs: Tensor) -> tuple[float, Tensor]:
    """T^2 KL over the whole vocabulary and its gradient for the hidden state."""
    hidden, head = student()
    hidden.requires_grad_(True)
    found = (hidden @ head.T / T).log_softmax(0)
    loss = T**2 * F.kl_div(found, logprobs.float(), log_target=True, reduction="sum")
    return float(loss.detach()), torch.autograd.grad(loss, hidden)[0]


def gradients(logprobs: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss ``[N]`` and gradient ``[N, D]`` of N draws of ids ``[N, K]``."""
    hidden, head = student()
    rows = hidden.expand(len(ids), D).clone().requires_grad_(True)
    label = torch.zeros(len(ids), dtype=torch.long)
    sampled = (ids, logprobs[ids].float(), weights.float())
    loss = sampled_distillation(rows, head, *sampled, label, label, T).kd
    return loss.detach(), torch.autograd.grad(loss.sum(), rows)[0]


def largest_deviation(found: Tensor, error: Tensor, wanted: Tensor) -> float:
    """Of the coordinates' mean over draws from the wanted ones, in standard errors."""
    return float(((found.mean(dim=0) - wanted) / error).abs().max())


# of D coordinates of an unbiased estimate one lies outside in a millionth of all tests
BOUND = NormalDist().inv_cdf(1 - 1e-6 / (2 * D))


@POWERS
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_is_that_of_the_full_kl_in_the_mean(seed: int, power: float) -> None:
    logprobs = teacher(seed)
    loss, wanted = full_gradient(logprobs)
    losses, found = gradients(logprobs, *weighted(logprobs, power))
    error = found.std(dim=0) / math.sqrt(DRAWS)
    assert largest_deviation(found, error, wanted) < BOUND
    assert abs(float(losses.mean()) - loss) < 5 * float(losses.std()) / math.sqrt(DRAWS)
    # the top K, renormalized, and the draws, all of one weight, do not pass the same check
    top = logprobs.topk(K)
    biased = {
        "top": (top.indices[None], top.values.softmax(0)[None]),
        "equal weights": (weighted(logprobs, power)[0], torch.full((DRAWS, K), 1 / K)),
    }
    for name, targets in biased.items():
        _, other = gradients(logprobs, *targets)
        assert largest_deviation(other, error, wanted) > 3 * BOUND, name


def test_less_noise_than_independent_draws_of_as_many_places() -> None:
    """Those, an id drawn c of K times weighing c / K, pass the check of the mean as well."""
    logprobs = teacher()
    _, wanted = full_gradient(logprobs)
    generator = torch.Generator().manual_seed(5)
    ids = logprobs.exp().expand(DRAWS, V).multinomial(K, replacement=True, generator=generator)
    _, independent = gradients(logprobs, ids, torch.full((DRAWS, K), 1 / K))
    error = independent.std(dim=0) / math.sqrt(DRAWS)
    assert largest_deviation(independent, error, wanted) < BOUND
    _, found = gradients(logprobs, *weighted(logprobs, 1.0))
    squared = [float((x - wanted).square().sum(dim=1).mean()) for x in (found, independent)]
    assert squared[0] < 0.5 * squared[1]


# --- the loss, chunk by chunk --------------------------------------------------------------------

P = 18


@pytest.fixture(params=[4, 6, P, 100])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that do and do not divide the number of positions."""
    monkeypatch.setattr(head_module, "CHUNK", request.param)


def random_targets() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Hidden states, head, and ids, log-probabilities, weights, labels and top-1."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(P, D, generator=generator).requires_grad_(True)
    head = torch.randn(V, D, generator=generator)
    ids = torch.rand(P, V, generator=generator).argsort(dim=1)[:, :K]
    logprobs = -torch.rand(P, K, generator=generator) * 5
    weights = torch.rand(P, K, generator=generator) / K
    labels, top1 = torch.randint(0, V, (2, P), generator=generator)
    return hidden, head, [ids, logprobs, weights, labels, top1]


def slow_losses(hidden: Tensor, head: Tensor, targets: list[Tensor], t: float) -> FullDistillation:
    """Position by position."""
    parts = []
    for h, ids, logprobs, weights, label, top1 in zip(hidden, *targets, strict=True):
        logits = head @ h
        log_s = (logits / t).log_softmax(0)
        kd = torch.zeros(())
        for i, p, w in zip(ids, logprobs, weights, strict=True):
            kd = kd + t**2 * w * (p - log_s[i])
        parts.append((kd, F.cross_entropy(logits, label), F.cross_entropy(logits, top1)))
    return FullDistillation(*(torch.stack(column) for column in zip(*parts, strict=True)))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("t", [1.0, 2.5])
def test_losses_and_gradients_are_the_equations(t: float) -> None:
    hidden, head, targets = random_targets()
    fast = sampled_distillation(hidden, head, *targets, t)
    slow = slow_losses(hidden, head, targets, t)
    upstream = torch.randn(3, P, generator=torch.Generator().manual_seed(2))
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    grads = [
        torch.autograd.grad((torch.stack(tuple(x)) * upstream).sum(), hidden)[0]
        for x in (fast, slow)
    ]
    assert torch.allclose(*grads, atol=1e-4)


def test_no_chunk_holds_more_than_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = head_module._sampled_chunk

    def watched(hidden: Tensor, *rest: object) -> object:
        sizes.append(len(hidden))
        return whole(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(head_module, "CHUNK", 5)
    monkeypatch.setattr(head_module, "_sampled_chunk", watched)
    hidden, head, targets = random_targets()
    sampled_distillation(hidden, head, *targets, 2.0).kd.sum().backward()
    assert max(sizes) == 5 and sum(sizes) == 2 * P  # recomputed once, in backward


def test_every_id_drawn_is_the_full_kl() -> None:
    hidden, head, targets = random_targets()
    logprobs = torch.stack([teacher(seed) for seed in range(P)])
    drawn = draw(logprobs, shifts(P), V, 1.0)
    weights = importance_weights(logprobs, drawn.threshold, 1.0).float()
    every = (drawn.ids, logprobs.float(), weights)
    found = sampled_distillation(hidden, head, *every, *targets[3:], T).kd
    logs = (hidden @ head.T / T).log_softmax(dim=1)
    slow = T**2 * F.kl_div(logs, logprobs.float(), log_target=True, reduction="none").sum(dim=1)
    assert torch.allclose(found, slow, rtol=1e-4)
    one, other = (torch.autograd.grad(x.sum(), hidden)[0] for x in (found, slow))
    assert torch.allclose(one, other, atol=1e-4)


def test_autocast_does_not_round_logits() -> None:
    hidden, head, targets = random_targets()
    plain = sampled_distillation(hidden, head, *targets, T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sampled_distillation(hidden, head, *targets, T)
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))
