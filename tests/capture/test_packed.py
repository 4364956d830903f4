"""A packed cache out of the capture: the raw one's content, and as safe against being killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.base.errors import MismatchError
from lib.cache.shards import CacheReader, shard_name
from lib.capture.build import cache_statistics
from tests.capture.test_build import Stopped, everything, files, stop_after
from tests.capture.tiny import build_tiny, tiny_spec


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    build_tiny(folder / "out", folder / "scratch")
    return folder / "out"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    build_tiny(folder / "out", folder / "scratch", codec="packed")
    return folder / "out"


def test_it_says_what_the_raw_cache_says(raw: Path, packed: Path) -> None:
    one, other = everything(raw), everything(packed)
    for name in ("input_ids", "mask", "negative_ids", "negative_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.topk_ids[..., 0], other.topk_ids[..., 0])
    (ids, order), (found, place) = (x.topk_ids.sort(dim=2) for x in (one, other))
    assert torch.equal(ids, found)
    p = one.topk_logprobs.gather(2, order).log_softmax(dim=2)
    q = other.topk_logprobs.gather(2, place).log_softmax(dim=2)
    divergence = (p.exp() * (p - q)).sum(dim=2)
    assert 0 < float(divergence[one.mask].mean()) < 2e-4
    torch.testing.assert_close(one.scaled_logsumexp, other.scaled_logsumexp, rtol=0, atol=0.03)
    torch.testing.assert_close(one.logsumexp, other.logsumexp, rtol=2**-11, atol=0)
    usable = one.negative_mask & one.mask[..., None]
    gap = (one.negative_logprobs - other.negative_logprobs)[usable].abs()
    assert 0 < float(gap.max()) < 0.5


def test_statistics(raw: Path, packed: Path) -> None:
    one, other = cache_statistics(raw), cache_statistics(packed)
    spec = tiny_spec(codec="packed")
    assert other["bytes_per_token"] == round(spec.bytes_per_token(), 1)
    assert other["bytes_per_token"] < 0.6 * one["bytes_per_token"]
    assert other["topk_mass"] == pytest.approx(one["topk_mass"], abs=5e-3)
    assert one.keys() == other.keys() and one["tokens"] == other["tokens"]


@pytest.mark.parametrize(("name", "calls"), [("capture_rows", 3), ("write_shard", 1)])
def test_stopped_build_resumes_to_the_same_bytes(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, name, calls)
        with pytest.raises(Stopped):
            build_tiny(tmp_path / "out", tmp_path / "scratch", codec="packed")
    kept = (tmp_path / "scratch" / shard_name(0)).stat().st_mtime_ns
    build_tiny(tmp_path / "out", tmp_path / "scratch", codec="packed")
    assert (tmp_path / "scratch" / shard_name(0)).stat().st_mtime_ns == kept
    assert files(tmp_path / "out") == files(packed)


@pytest.mark.parametrize("changes", [{"codec": "raw"}, {"codec": "packed", "level_bits": 5}])
def test_shards_of_another_codec_are_not_used(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    build_tiny(tmp_path / "out", tmp_path / "scratch", **changes)
    count = stop_after(monkeypatch, "capture_rows", 99)
    build_tiny(tmp_path / "out", tmp_path / "scratch", codec="packed")
    assert count == [5]
    assert files(tmp_path / "out") == files(packed)


def test_a_reader_refuses_a_shard_of_the_other_codec(
    raw: Path, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "mixed")
    shutil.copy(raw / shard_name(1), tmp_path / "mixed")
    with pytest.raises(MismatchError, match="codec raw, the index says packed"):
        CacheReader(tmp_path / "mixed").batch(np.arange(6))
