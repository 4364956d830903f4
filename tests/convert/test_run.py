"""The conversion stage from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.base.errors import InputError, MismatchError
from lib.convert.run import convert_stage
from lib.model.calibrate import input_moments
from lib.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from lib.model.load import folder_fingerprint
from lib.model.moments import StoredMoments, write_moments
from lib.model.surgery import bake
from lib.objective.distillation import make_objective
from lib.objective.loss import held_out_loss
from lib.params.data import Run
from lib.params.training import Convert, Distill
from lib.snap.snap import snap_model
from tests.tiny_models import (
    CPU,
    make_caches,
    make_place,
    quantized,
    readers,
    same,
    state_of,
    tiny_model,
)
from tests.train.samples import config, train

PARAMS = Convert(rank=8, attention_rank=8, group_size=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cache``, ``moments.safetensors`` and ``trained``, a checkpoint after some training."""
    folder = tmp_path_factory.mktemp("place")
    cache = make_caches(folder / "cache")
    model = quantized()
    train(model, cache, folder / "scratch", config(steps=10))
    save(model, folder / "trained")
    ids, lengths = readers(cache)[0].sequences(16)
    moments = input_moments(tiny_model(), ids, lengths, full=True)
    write_moments(folder / "moments.safetensors", moments, {"teacher": "tiny"})
    return folder


def save(model: Any, folder: Path) -> None:
    save_checkpoint(model, folder, tokenizer_from=folder, info={"teacher": "tiny", "stage": "x"})


def convert(place: Path, checkpoint: Path, out: Path, params: Convert = PARAMS) -> dict[str, Any]:
    return convert_stage(
        checkpoint,
        place / "teacher",
        place / "cache",
        place / "moments.safetensors",
        out,
        params=params,
        distill=Distill(),
        run=Run(device="cpu"),
        declared="d",
    )


def test_it_beats_the_reference_rule_and_says_what_it_cost(place: Path, tmp_path: Path) -> None:
    metrics = convert(place, place / "trained", tmp_path / "out")
    assert metrics["kd_before"] < metrics["kd_after"] < metrics["kd_reference_rule"]
    assert (metrics["converted"], metrics["kept"]) == (6, 8)
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == {"convert": metrics}
    model, info = load_checkpoint(tmp_path / "out/model")
    _, val = readers(place / "cache")
    objective = make_objective(val, temperature=2.0, target="candidates")
    assert held_out_loss(model, objective, val, 64, CPU) == metrics["kd_after"]
    before, _ = load_checkpoint(place / "trained")
    assert held_out_loss(before, objective, val, 64, CPU) == metrics["kd_before"]
    assert info["teacher"] == "tiny" and info["result"] == metrics
    assert info["parent"] == read_config(place / "trained")["fingerprint"]


def test_two_runs_are_equal(place: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        convert(place, place / "trained", tmp_path / name)
    one, other = (load_checkpoint(tmp_path / n / "model")[0] for n in ("a", "b"))
    assert same(state_of(one), state_of(other))
    for file in ("metrics.json", "model/config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_four_levels_from_the_start_pass_unharmed(place: Path, tmp_path: Path) -> None:
    save(quantized(lut_size=4), tmp_path / "four")
    metrics = convert(place, tmp_path / "four", tmp_path / "out")
    assert (metrics["converted"], metrics["kept"]) == (0, 14)
    # the factors change form and are rounded to FP16 anew
    assert metrics["kd_after"] == pytest.approx(metrics["kd_before"], rel=5e-3)


def test_refusals(place: Path, tmp_path: Path) -> None:
    snapped = quantized()
    snap_model(snapped, baked=False)
    save(snapped, tmp_path / "snapped")
    with pytest.raises(MismatchError, match="is snapped; convert the checkpoint that"):
        convert(place, tmp_path / "snapped", tmp_path / "out")
    baked = quantized()
    bake(baked)
    save(baked, tmp_path / "baked")
    with pytest.raises(InputError, match="no quantized layer to convert"):
        convert(place, tmp_path / "baked", tmp_path / "out")
    save_checkpoint(quantized(), tmp_path / "m", tokenizer_from=tmp_path, info={"teacher": "t"})
    with pytest.raises(MismatchError, match="made with teacher tiny, but t is in use"):
        convert(place, tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_error_feedback_loses_less(place: Path, tmp_path: Path) -> None:
    plain = PARAMS.model_copy(update={"init": "maxabs"})
    fed = PARAMS.model_copy(update={"init": "gptq"})
    kd = [
        convert(place, place / "trained", tmp_path / name, params)["kd_after"]
        for name, params in (("plain", plain), ("fed", fed))
    ]
    assert kd[1] < kd[0]


def test_from_the_teacher(place: Path, tmp_path: Path) -> None:
    """Its own weights, whatever training made of them; another teacher's are refused."""
    make_place(tmp_path)
    mark = folder_fingerprint(tmp_path / "teacher")
    moments = StoredMoments(place / "moments.safetensors", teacher="tiny", full=True)
    write_moments(tmp_path / "moments.safetensors", dict(moments), {"teacher": mark})
    model, _ = load_checkpoint(place / "trained")
    for name in ("trained", "untrained"):
        about = {"teacher": mark, "stage": "x"}
        save_checkpoint(model, tmp_path / name, tokenizer_from=tmp_path, info=about)
        model = quantized()
    params = PARAMS.model_copy(update={"source": "teacher"})
    found = []
    for name in ("trained", "untrained"):
        metrics = convert(tmp_path, tmp_path / name, tmp_path / "out" / name, params)
        assert (metrics["converted"], metrics["kept"]) == (14, 0)
        found.append(state_of(load_checkpoint(tmp_path / "out" / name / "model")[0]))
    assert same(*found)
    tiny_model(seed=6).save_pretrained(tmp_path / "teacher")
    with pytest.raises(MismatchError, match=f"trained was made from teacher {mark}, and .*teacher"):
        convert(tmp_path, tmp_path / "trained", tmp_path / "none", params)
    assert not (tmp_path / "none").exists()


def test_moments_must_be_the_teachers_and_are_not_always_needed(
    place: Path, tmp_path: Path
) -> None:
    write_moments(tmp_path / "moments.safetensors", {}, {"teacher": "another"})
    (tmp_path / "cache").symlink_to(place / "cache")
    with pytest.raises(MismatchError, match="made with teacher another, but tiny is in use"):
        convert(tmp_path, place / "trained", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plain = PARAMS.model_copy(update={"init": "maxabs"})
    convert(tmp_path, place / "trained", tmp_path / "out", plain)
    config = read_config(tmp_path / "out/model")
    assert config["info"]["moments"] is None
