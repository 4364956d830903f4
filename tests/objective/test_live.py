"""Losses on text, with the teacher at hand or without one, against full logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib.distill import head as head_module
from lib.objective.distillation import Objective, make_objective
from lib.objective.live import AnswerBatches, LiveObjective, TextBatches, TextObjective
from lib.text.sequences import TokenSet, write_tokens
from tests.tiny_models import CPU, VOCAB, make_caches, quantized, random_rows, readers, tiny_model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 7)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenSet:
    """The rows of the caches' train split, the first third of each row a prompt."""
    rows = random_rows(4, "train", 0)
    prompt = np.zeros(rows.input_ids.shape, dtype=bool)
    prompt[:, : rows.input_ids.shape[1] // 3] = True
    about = {"split": "train", "vocab_size": VOCAB, "pad_id": 0, "tokenizer": "none"}
    write_tokens(tmp_path / "rows", rows.input_ids, rows.lengths, prompt, **about)  # type: ignore[arg-type]
    return TokenSet(tmp_path / "rows")


@pytest.fixture
def held_out(tmp_path: Path) -> Objective:
    """The cached objective, every logit in the cache."""
    train, _ = readers(make_caches(tmp_path / "cache", rows=4, top_k=VOCAB, negatives=0))
    return make_objective(train, temperature=2.0, target="candidates", distill_weight=0.5)


def live(held_out: Objective, **changes: float) -> LiveObjective:
    values = {"temperature": 2.0, "distill_weight": 1.0, "hard_full_weight": 0.0, **changes}
    return LiveObjective(teacher=tiny_model(), held_out=held_out, **values)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0},
        {"distill_weight": 0.3},
        {"hard_full_weight": 0.4},
        {"temperature": 3.0, "distill_weight": 0.0, "hard_full_weight": 0.1},
    ],
    ids=str,
)
def test_sums_and_gradients_are_the_equation(
    tokens: TokenSet, held_out: Objective, settings: dict[str, float]
) -> None:
    objective = live(held_out, **settings)
    batch = TextBatches(tokens).batch(np.array([0, 3, 1]))  # row 0 is padded
    model = quantized(lut_size=4)
    parameters = [p for n, p in model.named_parameters() if "scale." in n]
    for parameter in parameters:
        parameter.requires_grad_(True)
    sums = objective(model, batch)

    t = objective.temperature
    wanted = objective.teacher(input_ids=batch.input_ids).logits.detach()
    found = model(input_ids=batch.input_ids).logits
    total = kd_total = torch.zeros(())
    for row, place in batch.mask.nonzero().tolist():
        p, z = wanted[row, place], found[row, place]
        kd = t**2 * F.kl_div((z / t).log_softmax(0), (p / t).softmax(0), reduction="sum")
        label = F.cross_entropy(z, batch.input_ids[row, place + 1])
        weight = objective.distill_weight
        hard = objective.hard_full_weight * F.cross_entropy(z, p.argmax())
        total = total + weight * kd + (1 - weight) * label + hard
        kd_total = kd_total + kd
    assert int(sums.count) == int(tokens.lengths[[0, 3, 1]].sum()) - 3
    assert float(sums.total.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(sums.held) == pytest.approx(float(kd_total.detach()), rel=1e-4)
    fast = torch.autograd.grad(sums.total, parameters)
    slow = torch.autograd.grad(total, parameters)
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_a_cache_of_every_logit_says_the_same(
    tmp_path: Path, tokens: TokenSet, held_out: Objective
) -> None:
    """Rounding to FP16 in the cache is all that lies between the two."""
    model = quantized(lut_size=4)
    objective = live(held_out)
    rows = np.arange(4)
    cache = readers(tmp_path / "cache")[0]
    batch = TextBatches(tokens).batch(rows)
    assert torch.equal(batch.input_ids, cache.batch(rows).input_ids)
    assert torch.equal(batch.mask, cache.batch(rows).mask)
    found, cached = objective(model, batch), objective.measured()(model, cache.batch(rows))
    assert int(found.count) == int(cached.count)
    assert float(found.held) == pytest.approx(float(cached.held), rel=2e-3)


def test_held_out_text_is_judged_by_the_cached_kd_alone(held_out: Objective) -> None:
    assert live(held_out).measured() == TextObjective(held_out=held_out).measured()
    assert live(held_out).measured() == held_out.measured() != held_out


def test_the_teacher_gets_no_gradient(tokens: TokenSet, held_out: Objective) -> None:
    objective = live(held_out)
    objective.teacher.requires_grad_(True)
    model = quantized(lut_size=4)
    weights = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    for weight in weights:
        weight.requires_grad_(True)
    objective(model, TextBatches(tokens).batch(np.arange(2))).total.backward()
    assert all(weight.grad is not None for weight in weights)
    assert all(p.grad is None for p in objective.teacher.parameters())


@pytest.mark.parametrize("kind", [TextBatches, AnswerBatches])
def test_labels_alone(tokens: TokenSet, held_out: Objective, kind: type[TextBatches]) -> None:
    """Cross entropy on every real token, or on those that are no prompt."""
    model = quantized(lut_size=4)
    batch = kind(tokens).batch(np.arange(4)).to(CPU)
    sums = TextObjective(held_out=held_out)(model, batch)
    logits = model(input_ids=batch.input_ids).logits
    total, count = torch.zeros(()), 0
    for row in range(4):
        for place in range(1, int(tokens.lengths[row])):
            if kind is AnswerBatches and tokens.prompt[row, place]:
                continue
            total = total + F.cross_entropy(logits[row, place - 1], batch.input_ids[row, place])
            count += 1
    assert int(sums.count) == count > 0
    assert float(sums.total) == pytest.approx(float(total), rel=1e-4)


def test_prompts_are_not_learned(tokens: TokenSet) -> None:
    rows = np.arange(4)
    everything, answers = (kind(tokens).batch(rows).mask for kind in (TextBatches, AnswerBatches))
    prompt = torch.from_numpy(np.array(tokens.prompt[:, 1:]))
    assert torch.equal(answers, everything & ~prompt)
    assert answers.sum() < everything.sum()
