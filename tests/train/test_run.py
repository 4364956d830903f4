"""A training stage from folder to folder."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.base.errors import CorruptError, InputError, LutqatError, MismatchError
from lib.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from lib.model.load import folder_fingerprint
from lib.model.surgery import bake, quantized_layers
from lib.params.data import Run
from lib.params.prox import Prox
from lib.params.training import Distill, Rates
from lib.snap.run import snap_stage
from lib.train import run as run_module
from lib.train.grid_report import grid_report
from lib.train.loop import Trainer
from lib.train.prox import penalty_of
from lib.train.run import Start, start_from_checkpoint, train_stage
from lib.train.state import Progress
from tests.tiny_models import (
    make_caches,
    make_place,
    model_spec,
    quantized,
    same,
    state_of,
)
from tests.train.killing import killed_after
from tests.train.samples import config, start_of

QUIET = Run(device="cpu", log_every=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher`` (a folder as the teacher stage leaves it) and ``cache``."""
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scratch folders go."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    return tmp_path / "root"


def stage(
    start: Start,
    place: Path,
    out: Path,
    target: Any = "candidates",
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> Progress:
    params = config(**{"steps": 4, **changes})
    return train_stage(
        "weights",
        start,
        place / "cache",
        out,
        params=params,
        distill=Distill(target=target),
        run=QUIET,
        tokenizer_from=place / "teacher",
        declared=str(sorted(changes.items())),
        **(more or {}),
    )


def test_folders_written_and_chained(place: Path, tmp_path: Path, root: Path) -> None:
    start = start_of(place / "teacher", model_spec(lut_size=4))
    result = stage(start, place, tmp_path / "one")
    out = tmp_path / "one"
    assert sorted(f.name for f in out.iterdir()) == ["log.csv", "metrics.json", "model"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["weights"]["best_kd"] == result.best_loss
    with (out / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "2", "4"]
    model, info = load_checkpoint(out / "model")
    assert same(state_of(model), state_of(start.model))
    assert (out / "model/tokenizer.json").exists()
    assert not (out / "model/plain").exists()  # nothing was averaged
    assert info["stage"] == "weights" and info["result"] == metrics["weights"]
    assert info["teacher"] == info["parent"] == folder_fingerprint(place / "teacher")
    assert not list((root / ".ckpt/weights").glob("*/"))  # nothing is left to resume

    following = start_from_checkpoint(out / "model")
    assert following.parent == read_config(out / "model")["fingerprint"]
    assert following.teacher == start.teacher
    again = stage(following, place, tmp_path / "two", target="tail")
    assert again.initial_loss > 0


def test_a_stage_starts_where_the_last_one_ended(place: Path, tmp_path: Path) -> None:
    """Training weights after scales: the first loss is the last stage's best, bit for bit."""
    start = start_of(place / "teacher", model_spec(lut_size=4))
    scales = {"scale_direction": 1e-3, "scale_magnitude": 1e-3, "weight": 0.0}
    rates = config().rates
    first = stage(start, place, tmp_path / "one", rates=rates.model_copy(update=scales), steps=8)
    assert first.best_step > 0
    layers = quantized_layers(load_checkpoint(tmp_path / "one/model")[0]).values()
    assert any(not torch.equal(x.nearest_indices(), x.indices) for x in layers)
    start = start_from_checkpoint(tmp_path / "one/model")
    second = stage(start, place, tmp_path / "two")
    assert second.initial_loss == first.best_loss


@pytest.mark.parametrize("regularizer", ["none", "prox"])
def test_how_masters_fit_their_grid_is_written_on_request(
    place: Path, tmp_path: Path, regularizer: Any
) -> None:
    start = start_of(place / "teacher", model_spec(lut_size=4))
    prox = Prox(gamma_end=0.5, atol=0.1)
    more = {"penalty": penalty_of(regularizer, prox), "grid_atol": prox.atol}
    stage(start, place, tmp_path / "out", more=more, rates=Rates(weight=3e-4))
    files = ["grid.json", "grid.svg", "log.csv", "metrics.json", "model"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == files
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["weights"]
    grid = json.loads((tmp_path / "out/grid.json").read_text())
    model, info = load_checkpoint(tmp_path / "out/model")
    assert grid == json.loads(json.dumps(asdict(grid_report(model, 0.1))))
    assert info["result"] == metrics and metrics["hit_rate"] == grid["overall"]["hit_rate"]
    assert ("prox_coefficient" in metrics) == (regularizer == "prox")
    with (tmp_path / "out/log.csv").open() as file:
        columns = csv.DictReader(file).fieldnames or []
    own = {"val_soft_kd_loss", "prox_distance", "prox_coefficient", "hit_rate", "sat_rate"}
    assert own & set(columns) == (own if regularizer == "prox" else set())


def test_a_killed_stage_resumes_and_other_params_do_not(
    place: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> Start:
        return start_of(place / "teacher", model_spec(lut_size=4))

    stage(start(), place, tmp_path / "whole", ema=0.5)
    plain = Trainer.train_step
    with killed_after(3) as steps:
        stage(start(), place, tmp_path / "parts", ema=0.5)
    assert steps == [0, 1, 2, 3]
    assert len(list((root / ".ckpt/weights").glob("*/state"))) == 1
    assert not (tmp_path / "parts/model").exists()

    def counts(self: Trainer) -> Any:
        steps.append(self.progress.step)
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", counts)
    steps.clear()
    stage(start(), place, tmp_path / "other", ema=0.6)
    assert steps == [0, 1, 2, 3]
    with monkeypatch.context() as patch:  # other code does not resume either
        patch.setattr(run_module, "code_fingerprint", lambda: "other")
        stage(start(), place, tmp_path / "other", ema=0.5)
    assert steps == [0, 1, 2, 3] * 2
    steps.clear()
    stage(start(), place, tmp_path / "parts", ema=0.5)
    assert steps == [2, 3]
    files = ("model.safetensors", "config.json", "plain/model.safetensors", "plain/config.json")
    for name in ("log.csv", "metrics.json", *(f"model/{file}" for file in files)):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_teacher_and_vocabulary_of_the_cache_must_fit(place: Path, tmp_path: Path) -> None:
    start = start_of(place / "teacher", model_spec())
    foreign = Start(start.model, "another", "another")
    with pytest.raises(MismatchError, match=r"made with teacher \w+, but another is in use here"):
        stage(foreign, place, tmp_path / "out")
    start.model.config.vocab_size = 98
    with pytest.raises(MismatchError, match="made with vocab_size 97, but 98 is in use"):
        stage(start, place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_cache_stops_the_stage(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    make_caches(broken / "cache", rows=4, teacher=folder_fingerprint(place / "teacher"))
    shard = broken / "cache/train/shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1000])
    start = start_of(place / "teacher", model_spec())
    with pytest.raises(CorruptError, match=r"shard-00000\.arrow is short"):
        stage(start, broken, tmp_path / "out")


def test_only_what_has_masters_and_a_teacher_can_train(place: Path, tmp_path: Path) -> None:
    trained, info = tmp_path / "trained", {"teacher": "t"}
    save_checkpoint(quantized(), trained, tokenizer_from=trained, info=info)
    assert start_from_checkpoint(trained).teacher == "t"
    cases: list[tuple[Path, type[LutqatError], str]] = []
    for baked in (False, True):
        snap_stage(trained, tmp_path / f"snap{baked}", baked=baked)
        cases.append((tmp_path / f"snap{baked}/model", MismatchError, "snapped or baked"))
    baked_model = quantized()
    bake(baked_model)
    save_checkpoint(baked_model, tmp_path / "baked", tokenizer_from=trained, info=info)
    cases.append((tmp_path / "baked", MismatchError, "snapped or baked"))
    save_checkpoint(quantized(), tmp_path / "orphan", tokenizer_from=trained, info={})
    cases.append((tmp_path / "orphan", InputError, "which teacher"))
    cases.append((place / "teacher", InputError, "not a lutqat checkpoint"))
    for folder, kind, message in cases:
        with pytest.raises(kind, match=message):
            start_from_checkpoint(folder)
