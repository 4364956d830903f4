"""The stage from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.base.errors import InputError, MismatchError
from lib.model.load import load_causal_lm
from lib.model.scores import block_scores, read_scores
from lib.model.surgery import quantized_layers
from lib.objective.distillation import make_objective
from lib.objective.loss import held_out_loss
from lib.params.data import Run
from lib.params.sensitivity import Sensitivity
from lib.params.training import Distill
from lib.quant.spec import ModelSpec
from lib.sensitivity.fisher import drawn_rows, fisher_scores
from lib.sensitivity.perturbation import perturbation_scores
from lib.sensitivity.run import sensitivity_stage
from tests.tiny_models import (
    CPU,
    make_place,
    model_spec,
    readers,
    tiny_model,
)
from tests.train.samples import save_start, start_of

SPEC = model_spec(lut_size=4)
MLPS = ModelSpec(mlp=SPEC.mlp, attention=None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher`` (a folder as the teacher stage leaves it), ``cache``, and in ``all`` and ``mlps``
    what the stage quant leaves."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    for name, spec in (("all", SPEC), ("mlps", MLPS)):
        save_start(folder / "teacher", spec, folder / name)
    return folder


def stage(
    place: Path, out: Path, quantized: str = "all", target: Any = "candidates", **section: Any
) -> dict[str, float]:
    return sensitivity_stage(
        place / "teacher",
        place / quantized,
        place / "cache",
        out,
        params=Sensitivity(**section),
        distill=Distill(target=target),
        run=Run(device="cpu"),
    )


def test_fisher_scores_of_the_untrained_model(place: Path, tmp_path: Path) -> None:
    scores = stage(place, tmp_path, "mlps", batches=3, batch_size=5, beta=0.5, seed=7)
    model = start_of(place / "teacher", MLPS).model
    train, _ = readers(place / "cache")
    objective = make_objective(train, temperature=2.0, target="candidates")
    rows = drawn_rows(64, 3, 5, 7)
    assert np.concatenate(rows).shape == (15,)
    assert scores == fisher_scores(model, objective, train, rows, 0.5, CPU)
    assert read_scores(tmp_path / "scores.json") == scores
    assert all("mlp" in name for name in scores) and len(scores) == 6  # attention is not quantized
    others: list[dict[str, Any]] = [{"seed": 8}, {"beta": 0.9}, {"batches": 2}, {"batch_size": 4}]
    values = {"batches": 3, "batch_size": 5, "beta": 0.5, "seed": 7}
    for changes in others:
        assert stage(place, tmp_path, "mlps", **{**values, **changes}) != scores
    assert stage(place, tmp_path, "mlps", "tail", **values) != scores


def test_perturbation_scores_on_held_out_text(place: Path, tmp_path: Path) -> None:
    scores = stage(place, tmp_path, method="perturbation", sequences=6)
    quantized = start_of(place / "teacher", SPEC).model
    _, val = readers(place / "cache")
    objective = make_objective(val, temperature=2.0, target="candidates")
    wanted = perturbation_scores(
        load_causal_lm(place / "teacher"),
        quantized_layers(quantized),
        lambda model: held_out_loss(model, objective, val, 6, CPU),
    )
    assert scores == wanted and min(scores.values()) > 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())["sensitivity"]
    assert metrics["highest"] == max(block_scores(scores, 2))
    assert stage(place, tmp_path, method="perturbation", sequences=5) != scores


@pytest.mark.parametrize("method", ["fisher", "perturbation"])
def test_two_runs_are_equal_and_their_file_is_taken(
    place: Path, tmp_path: Path, method: str
) -> None:
    for name in ("a", "b"):
        stage(place, tmp_path / name, method=method)
    for name in ("scores.json", "scores.svg", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stage(place, tmp_path / "c", method="file", file=str(tmp_path / "a/scores.json"))
    for name in ("scores.json", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_a_published_file_is_taken(place: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text('{"sensitivity_scores": [3, 1.5]}')
    scores = stage(place, tmp_path / "out", method="file", file=str(given))
    assert scores == {"model.layers.0": 3.0, "model.layers.1": 1.5}
    assert read_scores(tmp_path / "out/scores.json") == scores


@pytest.mark.parametrize("method", ["fisher", "perturbation"])
def test_the_cache_must_be_the_teachers(place: Path, tmp_path: Path, method: str) -> None:
    other = tmp_path / "other"
    tiny_model(seed=6).save_pretrained(other / "teacher")
    save_start(other / "teacher", SPEC, other / "all")
    (other / "cache").symlink_to(place / "cache")
    with pytest.raises(MismatchError, match="made with teacher"):
        stage(other, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_a_bad_file_writes_nothing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json is not a file here"):
        stage(place, tmp_path / "out", method="file", file=str(tmp_path / "absent.json"))
    assert not (tmp_path / "out").exists()
