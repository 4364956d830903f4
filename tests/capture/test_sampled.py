"""Sampled targets out of the capture: what the teacher says, whatever the batches or kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.base.errors import NonFiniteError, ParamsError
from lib.cache.sampled import SampledBatch, SampledBatches
from lib.cache.shards import CacheReader
from lib.cache.spec import draw_shifts
from lib.capture.build import cache_metrics, cache_statistics
from lib.capture.sampled import read_sampled
from lib.distill.sampling import draw
from tests.capture.test_build import Stopped, files, slow_logprobs, stop_after
from tests.capture.tiny import ROWS, VOCAB, build_tiny, tiny_llama, tiny_rows, tiny_spec
from tests.tiny_models import make_caches

SAMPLED: dict[str, Any] = {"targets": "sampled", "samples": 9, "sample_temperature": 2.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cache, built in one go."""
    folder = tmp_path_factory.mktemp("whole")
    build_tiny(folder / "out", folder / "scratch", **SAMPLED)
    return folder / "out"


def everything(folder: Path) -> SampledBatch:
    reader = SampledBatches(CacheReader(folder))
    return reader.batch(np.arange(len(reader)))


def slow_targets(temperature: float) -> torch.Tensor:
    """log p at a temperature, ``[N, P, V]``, of the teacher run a row at a time."""
    return (slow_logprobs()[0] / temperature).log_softmax(dim=2)


@pytest.mark.parametrize("changes", [{}, {"sample_temperature": 1.0}, {"sample_power": 0.5}])
def test_cache_says_what_the_teacher_says(tmp_path: Path, changes: dict[str, float]) -> None:
    build_tiny(tmp_path / "out", tmp_path / "scratch", **{**SAMPLED, **changes})
    batch, mask = everything(tmp_path / "out"), everything(tmp_path / "out").mask
    spec = tiny_spec(**{**SAMPLED, **changes})
    logprobs = slow_targets(spec.sample_temperature)
    shifts = torch.from_numpy(np.stack([draw_shifts(spec, row) for row in range(ROWS)]))
    drawn = draw(logprobs[mask], shifts[mask], spec.samples, spec.sample_power)
    assert torch.equal(batch.sample_ids[mask], drawn.ids)
    kept = logprobs[mask].gather(1, drawn.ids)
    torch.testing.assert_close(batch.logprobs[mask], kept, rtol=2**-11, atol=1e-5)
    h = drawn.threshold.float()[:, None]
    inclusion = (spec.sample_power * kept - h).exp().clamp(max=1)
    torch.testing.assert_close(batch.weights[mask], kept.exp() / inclusion, rtol=5e-3, atol=1e-6)
    assert torch.equal(batch.top1_ids[mask], logprobs[mask].argmax(dim=1))
    np.testing.assert_array_equal(batch.input_ids.numpy(), tiny_rows().input_ids)
    np.testing.assert_array_equal(mask.sum(dim=1).numpy(), tiny_rows().lengths - 1)


def test_rows_do_not_depend_on_batches_or_shards(whole: Path, tmp_path: Path) -> None:
    sizes = {"batch_size": 5, "shard_sequences": 7}
    build_tiny(tmp_path / "out", tmp_path / "scratch", **SAMPLED, **sizes)
    one, other = everything(whole), everything(tmp_path / "out")
    assert torch.equal(one.sample_ids[one.mask], other.sample_ids[one.mask])
    torch.testing.assert_close(one.weights, other.weights, rtol=2**-9, atol=1e-6)


def test_another_seed_draws_others(whole: Path, tmp_path: Path) -> None:
    build_tiny(tmp_path / "out", tmp_path / "scratch", **SAMPLED, seed=1)
    one, other = everything(whole), everything(tmp_path / "out")
    assert not torch.equal(one.sample_ids, other.sample_ids)
    assert torch.equal(one.top1_ids, other.top1_ids)


def test_all_of_the_vocabulary_is_the_softmax(tmp_path: Path) -> None:
    build_tiny(tmp_path / "out", tmp_path / "scratch", **{**SAMPLED, "samples": VOCAB})
    batch = everything(tmp_path / "out")
    assert torch.equal(batch.sample_ids, torch.arange(VOCAB).expand_as(batch.sample_ids))
    wanted = slow_targets(2.0)[batch.mask].exp()
    torch.testing.assert_close(batch.weights[batch.mask], wanted, rtol=2**-7, atol=1e-6)


def test_statistics(whole: Path, tmp_path: Path) -> None:
    batch = everything(whole)
    mass = float(batch.logprobs.exp().sum(dim=2)[batch.mask].mean())
    found = cache_statistics(whole)
    assert found.pop("sampled_mass") == pytest.approx(mass, abs=1e-5)
    assert 0 < mass < 1
    assert found == {
        "sequences": ROWS,
        "tokens": int((tiny_rows().lengths - 1).sum()),
        "bytes_per_token": round(tiny_spec(**SAMPLED).bytes_per_token(), 1),
    }
    both = cache_metrics(make_caches(tmp_path, rows=8, **SAMPLED))
    assert "sampled_mass" in both and both["val_sequences"] == 16


@pytest.mark.parametrize(("name", "calls"), [("capture_rows", 3), ("write_shard", 1)])
def test_stopped_build_resumes_to_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, name, calls)
        with pytest.raises(Stopped):
            build_tiny(tmp_path / "out", tmp_path / "scratch", **SAMPLED)
    build_tiny(tmp_path / "out", tmp_path / "scratch", **SAMPLED)
    assert files(tmp_path / "out") == files(whole)


def test_shards_of_the_top_k_are_not_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny(tmp_path / "out", tmp_path / "scratch")
    count = stop_after(monkeypatch, "capture_rows", 99)
    build_tiny(tmp_path / "out", tmp_path / "scratch", **SAMPLED)
    assert count == [5]
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_spoiled_logit_is_found(value: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, 13] = value
    part = read_sampled(logits, torch.rand(3), tiny_spec(**SAMPLED))
    assert part["finite"].tolist() == [True, False, True]


def test_a_spoiled_weight_names_the_row(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[13] = float("nan")
    with pytest.raises(NonFiniteError, match="row 0, position 0"):
        build_tiny(tmp_path / "out", tmp_path / "scratch", model=model, **SAMPLED)


def test_too_many_for_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"cache.samples = 98.*vocabulary of 97"):
        build_tiny(tmp_path / "out", tmp_path / "scratch", **{**SAMPLED, "samples": VOCAB + 1})
