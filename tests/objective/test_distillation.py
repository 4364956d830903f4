"""The training objective against logits of the whole vocabulary, computed naively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib.base.errors import MismatchError
from lib.cache.shards import CachedBatch
from lib.distill import head as head_module
from lib.objective import loss
from lib.objective.distillation import Objective, make_objective
from lib.objective.loss import held_out_loss
from tests.capture.tiny import VOCAB
from tests.tiny_models import CPU, make_caches, quantized, readers, tiny_model

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 2.0, "target": "candidates"},
    {"temperature": 1.0, "target": "tail"},
    {"temperature": 2.0, "target": "tail"},
    {"temperature": 2.0, "target": "candidates", "distill_weight": 0.3},
    {"temperature": 2.0, "target": "candidates", "hard_top1_weight": 0.7},
    {"temperature": 2.0, "target": "candidates", "hard_full_weight": 0.4},
    {
        "temperature": 2.0,
        "target": "tail",
        "distill_weight": 0.6,
        "hard_top1_weight": 0.2,
        "hard_full_weight": 0.1,
    },
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_caches(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 7)


def student(**changes: Any) -> PreTrainedModel:
    return quantized(lut_size=4, **changes)


def naive(
    model: PreTrainedModel, batch: CachedBatch, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(total, KD) summed position by position, from full logits."""
    temperature = settings["temperature"]
    logits = model(input_ids=batch.input_ids).logits.float()
    total = kd_total = torch.zeros(())
    for row, position in batch.mask.nonzero().tolist():
        z = logits[row, position]
        top = batch.topk_ids[row, position]
        negatives = [
            (int(i), p)
            for i, p in zip(
                batch.negative_ids[row], batch.negative_logprobs[row, position], strict=True
            )
            if i not in top
        ]
        ids = torch.tensor([*top.tolist(), *(i for i, _ in negatives)])
        known = torch.stack([*batch.topk_logprobs[row, position], *(p for _, p in negatives)])
        if settings["target"] == "tail":
            column = [1.0, 2.0].index(temperature)
            t = known / temperature - batch.scaled_logsumexp[row, position, column]
            s = (z / temperature).log_softmax(dim=0)[ids]
            t, s = (torch.cat([x, (1 - x.exp().sum()).log()[None]]) for x in (t, s))
        else:
            t, s = (
                (known / temperature).log_softmax(dim=0),
                (z[ids] / temperature).log_softmax(dim=0),
            )
        kd = temperature**2 * (t.exp() * (t - s)).sum()
        weight = settings.get("distill_weight", 1.0)
        label = batch.input_ids[row, position + 1]
        loss = weight * kd + (1 - weight) * F.cross_entropy(z, label)
        loss = loss + settings.get("hard_top1_weight", 0.0) * F.cross_entropy(
            z[ids], torch.tensor(0)
        )
        loss = loss + settings.get("hard_full_weight", 0.0) * F.cross_entropy(z, top[0])
        total, kd_total = total + loss, kd_total + kd
    return total, kd_total


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sums_and_gradients_are_the_equation(cache: Path, settings: dict[str, Any]) -> None:
    train, _ = readers(cache)
    batch = train.batch(np.array([0, 3, 4]))  # rows 0 and 4 are padded
    assert not batch.negative_mask.all() and not batch.mask.all()
    objective = make_objective(train, **settings)
    model = student()
    parameters = [p for n, p in model.named_parameters() if "scale." in n]
    for parameter in parameters:
        parameter.requires_grad_(True)
    sums = objective(model, batch)
    total, kd = naive(model, batch, settings)
    assert sums.count == int(batch.mask.sum())
    assert float(sums.total.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(sums.held) == pytest.approx(float(kd.detach()), rel=1e-4)
    fast = torch.autograd.grad(sums.total, parameters)
    slow = torch.autograd.grad(total, parameters)
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_cached_kd_with_the_whole_vocabulary_is_full_logit_kd(tmp_path: Path) -> None:
    train, _ = readers(make_caches(tmp_path, rows=4, top_k=VOCAB, negatives=0))
    batch = train.batch(np.arange(4))
    teacher, model = tiny_model(), student()
    with torch.no_grad():
        p, q = (m(input_ids=batch.input_ids).logits[:, :-1] / 2.0 for m in (teacher, model))
        slow = 4 * F.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        for target in ("candidates", "tail"):
            sums = make_objective(train, temperature=2.0, target=target)(model, batch)
            # the cache holds float16: log-probabilities are off by 2^-8 at worst
            assert float(sums.held) == pytest.approx(float(slow[batch.mask].sum()), rel=2e-3)


def test_the_same_from_a_packed_cache_within_its_rounding(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rows": 4, "top_k": VOCAB, "negatives": 0}
    raw, _ = readers(make_caches(tmp_path / "raw", **changes))
    model, held = student(), {}
    with torch.no_grad():
        wanted = make_objective(raw, temperature=2.0, target="tail")(model, raw.batch(np.arange(4)))
        for bits in (3, 8):
            name = f"packed-{bits}"
            made = make_caches(tmp_path / name, codec="packed", level_bits=bits, **changes)
            packed, _ = readers(made)
            for target in ("candidates", "tail"):
                objective = make_objective(packed, temperature=2.0, target=target)
                sums = objective(model, packed.batch(np.arange(4)))
                held[target, bits] = abs(float(sums.held / wanted.held) - 1)
    # rounding moves the loss by about 2 sqrt(KL loss), KL quartered by each bit
    for target in ("candidates", "tail"):
        assert held[target, 8] < 2e-3 < held[target, 3] < 0.2


def test_padding_does_not_count(cache: Path) -> None:
    train, _ = readers(cache)
    batch = train.batch(np.array([0, 1]))
    objective = make_objective(train, temperature=2.0, target="tail", hard_full_weight=0.1)
    model = student()
    with torch.no_grad():
        one = objective(model, batch)
        batch.input_ids[0, 6:] = 50  # what the padding holds, and what is cached for it
        batch.topk_logprobs[0, 6:] = -3.0
        other = objective(model, batch)
        batch.input_ids[0, 2] = batch.input_ids[0, 2] % 90 + 1
        changed = objective(model, batch)
    assert one.total == other.total and one.held == other.held and one.count == other.count
    assert changed.total != one.total


def test_a_batch_of_padding_alone_is_zero(cache: Path) -> None:
    train, _ = readers(cache)
    batch = train.batch(np.array([0]))
    batch.mask[:] = False
    sums = make_objective(train, temperature=2.0, target="candidates")(student(), batch)
    assert (float(sums.total), float(sums.held), sums.count) == (0.0, 0.0, 0)


def test_negatives_count(cache: Path) -> None:
    train, _ = readers(cache)
    batch = train.batch(np.arange(4))
    objective, model = make_objective(train, temperature=2.0, target="candidates"), student()
    with torch.no_grad():
        whole = objective(model, batch).held
        batch.negative_mask[:] = False
        assert objective(model, batch).held < 0.99 * whole


@pytest.mark.parametrize("target", ["candidates", "tail"])
@pytest.mark.parametrize("eval_batch", [1, 3, 8, 100])
def test_held_out_kd_is_the_mean_over_real_positions(
    cache: Path, target: str, eval_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "EVAL_BATCH", eval_batch)
    _, val = readers(cache)
    objective = make_objective(
        val, temperature=2.0, target=target, distill_weight=0.2, hard_top1_weight=3.0
    )
    model = student()
    for count in (5, 1000):
        batch = val.batch(np.arange(min(count, len(val))))
        with torch.no_grad():
            _, kd = naive(model, batch, {"temperature": 2.0, "target": target})
        found = held_out_loss(model, objective, val, count, CPU)
        # only the KD term, whatever weights the stage trains with
        assert found == pytest.approx(float(kd) / int(batch.mask.sum()), rel=1e-4)


def test_the_teacher_itself_has_no_loss(cache: Path) -> None:
    _, val = readers(cache)
    for target in ("candidates", "tail"):
        objective = make_objective(val, temperature=2.0, target=target)
        assert held_out_loss(tiny_model(), objective, val, 8, CPU) < 1e-4
        assert held_out_loss(student(), objective, val, 8, CPU) > 0.1


def test_the_tail_needs_its_temperature(cache: Path) -> None:
    train, _ = readers(cache)
    with pytest.raises(MismatchError, match=r"3\.0 .*holds \[1\.0, 2\.0\].*cache\.temperatures"):
        make_objective(train, temperature=3.0, target="tail")
    assert make_objective(train, temperature=3.0, target="candidates").temperature == 3.0
    assert make_objective(train, temperature=2.0, target="tail").temperature_index == 1


def test_the_whole_vocabulary_is_visited_only_if_needed() -> None:
    def objective(**changes: Any) -> Objective:
        values: dict[str, Any] = {
            "temperature": 2.0,
            "tail": False,
            "temperature_index": 0,
            "distill_weight": 1.0,
            "hard_top1_weight": 0.5,
            "hard_full_weight": 0.0,
        }
        return Objective(**{**values, **changes})

    assert not objective().needs_full_vocabulary
    for changes in ({"tail": True}, {"distill_weight": 0.9}, {"hard_full_weight": 1e-4}):
        assert objective(**changes).needs_full_vocabulary
