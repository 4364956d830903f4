"""Merging profiles: comments stay, the result is valid, and nothing is lost when it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.base.errors import ParamsError
from lib.params.load import load_params
from lib.params.profile import apply_profile, available_profiles

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "profiles"
SHIPPED = available_profiles(PROFILES)


@pytest.fixture
def params(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


def write_profile(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder


def test_profiles_are_there() -> None:
    assert {
        "apple-2bit",
        "blockwise-w4g64",
        "layerwise-q4a4",
        "llama-2-7b-blockwise",
        "llama-3.2-1b-blockwise",
        "prox",
        "prox-llama-3.2-1b",
        "qwen3-0.6b",
        "smollm2",
        "smollm2-long",
        "tiny",
    } <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_valid(params: Path, name: str) -> None:
    apply_profile(name, params, PROFILES)
    load_params(params)
    assert apply_profile(name, params, PROFILES) == []


def test_default_profile_is_the_shipped_file(params: Path) -> None:
    assert apply_profile("smollm2", params, PROFILES) == []
    assert params.read_bytes() == (ROOT / "params.yaml").read_bytes()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_profile_leaves_nothing_of_those_before(params: Path, tmp_path: Path, name: str) -> None:
    alone = Path(shutil.copy(params, tmp_path / "alone.yaml"))
    apply_profile(name, alone, PROFILES)
    for other in SHIPPED:
        apply_profile(other, params, PROFILES)
    apply_profile(name, params, PROFILES)
    assert load_params(params) == load_params(alone)


def test_documented_defaults_are_in_the_qwen_profile(params: Path) -> None:
    apply_profile("qwen3-0.6b", params, PROFILES)
    values = load_params(params)
    assert values.teacher.revision == "c1899de289a04d12100db370d81485cdf75e47ca"
    assert values.tokens.train[0].enable_thinking == "both"
    assert values.scales.rates.scale_direction == 1e-3
    assert values.weights.rates.weight == 5e-6
    assert values.finetune.rates.weight == 1e-6
    assert values.finetune_q2.rates.weight == 5e-5
    assert (values.convert.lut_size, values.convert.attention_lut_size) == (4, 16)
    assert (values.convert.rank, values.convert.attention_rank) == (32, 8)


def test_documented_settings_of_proximal_training(params: Path) -> None:
    apply_profile("prox-llama-3.2-1b", params, PROFILES)
    values = load_params(params)
    weights = values.weights
    assert (weights.regularizer, weights.steps, weights.warmup_steps) == ("prox", 3000, 100)
    assert (weights.batch_size, weights.grad_accum) == (4, 32)  # a global batch of 128
    assert (values.tokens.max_length, values.prox.fisher, values.prox.fisher_beta) == (
        256,
        True,
        0.95,
    )
    assert values.teacher.revision == "4e20de362430cd3b72f300e6b0f18e50e7166e08"


def test_comments_order_and_spelling_stay(params: Path, tmp_path: Path) -> None:
    before = params.read_text().splitlines()
    profile = write_profile(
        tmp_path,
        "quant: {rank: 8}\n"
        "scales: {rates: {scale_direction: 2e-3}}\n"
        "cache: {temperatures: [1.0, 3.0]}\n",
    )
    changed = apply_profile("mine", params, profile)
    assert changed == ["quant.rank", "scales.rates.scale_direction", "cache.temperatures"]
    after = params.read_text().splitlines()
    differing = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split("#")[0].strip() for _, new in differing] == [
        "temperatures: [1.0, 3.0]",
        "rank: 8",
        "scale_direction: 2e-3",
    ]
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in differing)


def test_lists_replace_also_with_nothing(params: Path, tmp_path: Path) -> None:
    source = "path:tests/data/prose.txt"
    profile = write_profile(tmp_path, f"tokens: {{train: [{{source: '{source}'}}], test: []}}\n")
    assert apply_profile("mine", params, profile) == ["tokens.train", "tokens.test"]
    tokens = load_params(params).tokens
    assert [entry.source for entry in tokens.train] == [source]
    assert tokens.test == ()


@pytest.mark.parametrize("text", ["quant: {rang: 4}\n", "quant: {lut_size: 5}\n", "- 1\n", "a: ["])
def test_invalid_profile_changes_nothing(params: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ParamsError) as caught:
        apply_profile("mine", params, write_profile(tmp_path, text))
    assert "mine" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert params.read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "params.yaml"]


@pytest.mark.parametrize("name", ["tinny", "smollm", "../params", ""])
def test_unknown_profile_lists_the_known_ones(params: Path, name: str) -> None:
    with pytest.raises(ParamsError, match=f"there are {', '.join(SHIPPED)}"):
        apply_profile(name, params, PROFILES)
    with pytest.raises(ParamsError, match="did you mean tiny"):
        apply_profile("tinny", params, PROFILES)


def test_no_profiles_at_all(params: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="there are none"):
        apply_profile("tiny", params, tmp_path / "empty")
