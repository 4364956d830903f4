"""The comparison of targets: as many bytes for each, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.targets import Progress, matched, summary_of
from benchmarks.teachers import packed_spec


@pytest.mark.parametrize(("top_k", "negatives"), [(64, 256), (64, 0), (50, 7)])
@pytest.mark.parametrize("length", [9, 128])
def test_as_many_bytes_and_no_room_for_one_more(top_k: int, negatives: int, length: int) -> None:
    sizes = {"top_k": top_k, "negatives": negatives, "max_length": length}
    spec = packed_spec(codec="raw", **sizes)
    found = matched(spec, 0.5)
    assert (found.targets, found.sample_power, found.seed) == ("sampled", 0.5, spec.seed)
    room = spec.bytes_per_token() - found.bytes_per_token()
    assert 0 <= room < 6 * spec.positions / spec.max_length


def test_bytes_of_the_recipe() -> None:
    spec = packed_spec(codec="raw", negatives=256, max_length=128)
    # 64 * 6 + 4 + 2 * 4 + 256 * 2 + 256 * 4 / 127 a position, of which 8 are no drawn id
    assert matched(spec, 1.0).samples == 151


def test_never_more_than_the_vocabulary() -> None:
    spec = packed_spec(codec="raw", vocab_size=97, top_k=8, negatives=89)
    assert matched(spec, 1.0).samples <= 97


def test_summary_pairs_equal_seeds() -> None:
    rows = {"a": (1.0, 2.0, 9.0), "b": (0.5, 1.8, 8.9)}
    samples = {
        arm: [{"kl": v, "perplexity": 10 * v, "seconds": 1.0} for v in values]
        for arm, values in rows.items()
    }
    found = summary_of(samples)
    assert found["a_kl"] == 2.0 and found["b_perplexity"] == 18.0
    assert found["b_minus_a_kl"] == pytest.approx(-0.2)
    assert "a_minus_a_kl" not in found


def test_a_run_that_was_ended_goes_on(tmp_path: Path) -> None:
    file, config = tmp_path / "x.json", {"steps": 3}
    first = Progress.of(file, config, ["a", "b"])
    assert first.missing(0) == ["a", "b"]
    first.samples["a"].append({"seed": 0, "kl": 1.0})
    first.caches["0"] = {"bytes": 9}
    first.save()
    again = Progress.of(file, config, ["a", "b"])
    assert again == first
    assert (again.missing(0), again.missing(1)) == (["b"], ["a", "b"])
    assert Progress.of(file, {"steps": 4}, ["a", "b"]).missing(0) == ["a", "b"]
