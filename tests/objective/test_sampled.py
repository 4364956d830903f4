"""The objective on sampled targets against full logits, and what a cache of them cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib.base.errors import MismatchError, ParamsError
from lib.cache.sampled import SampledBatches
from lib.distill import head as head_module
from lib.model.blocks import decoder_blocks
from lib.objective.distillation import make_objective
from lib.objective.lesson import cached_lesson
from lib.objective.local import LayerLoss, TailBatches
from lib.objective.sampled import SampledObjective
from tests.tiny_models import VOCAB, make_caches, quantized, readers, tiny_model

SAMPLED: dict[str, Any] = {"targets": "sampled", "samples": 9, "sample_temperature": 2.0}
T = 2.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_caches(tmp_path_factory.mktemp("cache"), rows=8, **SAMPLED)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 7)


def lesson(cache: Path, **terms: Any) -> tuple[SampledObjective, SampledBatches]:
    loss, rows = cached_lesson(*readers(cache), **{"temperature": T, "target": "tail", **terms})
    assert isinstance(loss, SampledObjective) and isinstance(rows, SampledBatches)
    return loss, rows


@pytest.mark.parametrize(
    "settings",
    [{}, {"distill_weight": 0.3}, {"hard_full_weight": 0.4, "distill_weight": 0.0}],
    ids=str,
)
def test_sums_and_gradients_are_the_equation(cache: Path, settings: dict[str, float]) -> None:
    objective, rows = lesson(cache, **settings)
    batch = rows.batch(np.array([0, 3, 4]))  # rows 0 and 4 are padded
    assert not batch.mask.all()
    model = quantized(lut_size=4)
    parameters = [p for n, p in model.named_parameters() if "scale." in n]
    for parameter in parameters:
        parameter.requires_grad_(True)
    sums = objective(model, batch)
    logits = model(input_ids=batch.input_ids).logits
    total = kd_total = torch.zeros(())
    for row, place in batch.mask.nonzero().tolist():
        z = logits[row, place]
        ids, w = batch.sample_ids[row, place], batch.weights[row, place]
        kd = T**2 * (w * (batch.logprobs[row, place] - (z / T).log_softmax(0)[ids])).sum()
        label = F.cross_entropy(z, batch.input_ids[row, place + 1])
        share, hard = objective.distill_weight, objective.hard_full_weight
        top = F.cross_entropy(z, batch.top1_ids[row, place])
        total = total + share * kd + (1 - share) * label + hard * top
        kd_total = kd_total + kd
    assert int(sums.count) == int(batch.mask.sum())
    assert float(sums.total.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(sums.held) == pytest.approx(float(kd_total.detach()), rel=1e-4)
    fast = torch.autograd.grad(sums.total, parameters)
    slow = torch.autograd.grad(total, parameters)
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def full_kd(cache: Path, model: Any) -> float:
    """Sum over the rows' positions of T^2 KL over whole logits."""
    batch = lesson(cache)[1].batch(np.arange(8))
    with torch.no_grad():
        p, q = (m(input_ids=batch.input_ids).logits[:, :-1] / T for m in (tiny_model(), model))
    logs = (q.log_softmax(-1), p.log_softmax(-1))
    kd = T**2 * F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    return float(kd[batch.mask].sum())


def test_a_cache_of_every_token_is_full_logit_kd(tmp_path: Path) -> None:
    cache = make_caches(tmp_path, rows=8, **{**SAMPLED, "samples": VOCAB})
    objective, rows = lesson(cache)
    model = quantized(lut_size=4)
    found = float(objective(model, rows.batch(np.arange(8))).held)
    # the cache holds float16: log-probabilities are off by 2^-8 at worst
    assert found == pytest.approx(full_kd(cache, model), rel=2e-3)


def test_caches_of_few_tokens_are_full_logit_kd_in_the_mean(tmp_path: Path) -> None:
    """16 seeds; their spread says how far the mean may be off."""
    model, found = quantized(lut_size=4), []
    for seed in range(16):
        cache = make_caches(tmp_path / str(seed), rows=8, seed=seed, **SAMPLED)
        objective, rows = lesson(cache)
        with torch.no_grad():
            found.append(float(objective(model, rows.batch(np.arange(8))).held))
    wanted, mean = full_kd(cache, model), float(np.mean(found))
    error = float(np.std(found, ddof=1)) / 4
    # Student's t of 15 degrees is beyond 6 once in 40,000 times
    assert abs(mean - wanted) < 6 * error and error < 0.05 * wanted
    top, _ = readers(make_caches(tmp_path / "top", rows=8, top_k=9, negatives=0))
    biased = make_objective(top, temperature=T, target="candidates")
    with torch.no_grad():
        off = float(biased(model, top.batch(np.arange(8))).held) - wanted
    assert abs(off) > 12 * error


def test_held_out_text_is_judged_by_its_top_k(cache: Path) -> None:
    train, val = readers(cache)
    objective, _ = lesson(cache, distill_weight=0.5, target="candidates")
    wanted = make_objective(val, temperature=T, target="candidates")
    assert objective.measured() == wanted.measured()
    assert (train.spec.targets, val.spec.targets) == ("sampled", "topk")


def test_the_top_k_are_learned_as_before(tmp_path: Path) -> None:
    train, val = readers(make_caches(tmp_path, rows=4))
    terms = {"distill_weight": 0.5, "hard_top1_weight": 0.1, "hard_full_weight": 0.2}
    loss, rows = cached_lesson(train, val, temperature=T, target="tail", **terms)
    assert rows is train
    assert loss == make_objective(train, temperature=T, target="tail", **terms)


def test_another_temperature_is_refused_by_name(cache: Path) -> None:
    with pytest.raises(MismatchError) as error:
        lesson(cache, temperature=1.0)
    words = ["train", "temperature 2.0", "cache.sample_temperature", "is 1.0", "rerun the cache"]
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_terms_without_candidates_are_refused(cache: Path) -> None:
    with pytest.raises(ParamsError, match=r"hard_top1_weight = 0.1.*cache.targets to topk"):
        lesson(cache, hard_top1_weight=0.1)


def test_padding_does_not_count(cache: Path) -> None:
    objective, rows = lesson(cache)
    batch = rows.batch(np.array([0, 1]))
    model = quantized(lut_size=4)
    with torch.no_grad():
        one = objective(model, batch)
        batch.input_ids[0, 6:] = 50  # what the padding holds, and what is cached for it
        batch.weights[0, 6:] = 3.0
        other = objective(model, batch)
    assert one.total == other.total and one.count == other.count


def test_a_layer_learns_from_them(cache: Path) -> None:
    """The loss of one layer, its local term off, is that of the whole model."""
    objective, rows = lesson(cache)
    model = quantized(lut_size=4)
    ids = rows.sequences(8)[0]
    with torch.no_grad():
        hidden = model.get_input_embeddings()(ids).numpy()
        mlp = decoder_blocks(tiny_model())[0].mlp
        weights = {"local_weight": 0.0, "global_weight": 1.0, "tokens": 4}
        loss = LayerLoss(objective=objective, block=0, mlp=mlp, **weights)  # type: ignore[arg-type]
        chosen = np.array([1, 5])
        found = loss(model, TailBatches(rows, hidden).batch(chosen))
        wanted = objective(model, rows.batch(chosen))
    assert float(found.total) == pytest.approx(float(wanted.total), rel=1e-5)
