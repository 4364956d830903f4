"""Training adapters from folder to folder."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.base.errors import InputError, MismatchError, ParamsError
from lib.cache.shards import CacheReader
from lib.model.adapter import adapter_layers, load_adapted
from lib.model.checkpoint import load_checkpoint, read_config
from lib.objective.distillation import make_objective
from lib.objective.loss import held_out_loss
from lib.recover.run import targets_of, with_adapters
from tests.recover.samples import make_snapped, recover, section, write_rows
from tests.tiny_models import CPU, same, state_of
from tests.train.killing import killed_after

FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/recover.json")
OUTPUTS = (*FILES, "log.csv", "metrics.json")


def held_out_kd(place: Path, adapter: Path) -> float:
    val = CacheReader(place / "cache" / "val")
    objective = make_objective(val, temperature=2.0, target="candidates")
    return held_out_loss(load_adapted(place / "snap", adapter), objective, val, 16, CPU)


@pytest.mark.parametrize("mode", ["kd_cache", "kd", "text", "sft"])
def test_every_mode_trains_and_keeps_the_best_by_held_out_kd(
    place: Path, tmp_path: Path, mode: str
) -> None:
    before = {path.name: path.read_bytes() for path in (place / "snap").iterdir()}
    progress = recover(place, tmp_path, mode=mode)
    losses = [float(row["loss"] or 0.0) for row in progress.rows[1:]]
    assert losses[-1] < losses[0]
    measured = [row["val_kd_loss"] for row in progress.rows if row.get("val_kd_loss") is not None]
    assert progress.best_loss == min(measured) and len(measured) == 4
    if mode.startswith("kd"):
        assert progress.best_loss < 0.97 * progress.initial_loss
    assert held_out_kd(place, tmp_path / "adapter") == pytest.approx(progress.best_loss, rel=1e-5)
    assert {path.name: path.read_bytes() for path in (place / "snap").iterdir()} == before
    info = json.loads((tmp_path / "adapter/recover.json").read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert info["trained"] and info["result"] == metrics["recover"]
    assert info["base"] == read_config(place / "snap")["fingerprint"]
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(n) for n in range(7)]


def test_modes_and_stabilizers_differ(place: Path, tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {
        "cache": {},
        "top1": {"hard_top1_weight": 0.5},
        "full": {"hard_full_weight": 0.5},
        "labels": {"distill_weight": 0.5},
        "kd": {"mode": "kd"},
        "kd full": {"mode": "kd", "hard_full_weight": 0.5},
        "text": {"mode": "text"},
        "sft": {"mode": "sft"},
        "attention": {"skip_k": False},
        "mlp": {"mlp_only": True},
    }
    first = {n: recover(place, tmp_path / n, steps=1, **r).rows[1]["loss"] for n, r in runs.items()}
    assert len(set(first.values())) == len(runs) - 2  # where adapters stand is no loss
    assert first["cache"] == first["attention"] == first["mlp"]
    assert first["full"] > first["cache"] and first["top1"] > first["cache"]


def test_only_adapters_change(place: Path, tmp_path: Path) -> None:
    recover(place, tmp_path)
    model = load_adapted(place / "snap", tmp_path / "adapter")
    plain = state_of(load_checkpoint(place / "snap")[0])
    found = {n.replace(".base_layer", ""): v for n, v in state_of(model).items()}
    assert same({name: found[name] for name in plain}, plain)
    moved = [float(p.norm()) for name, p in model.named_parameters() if ".lora_B." in name]
    assert min(moved) > 0  # every one of them, in front of whatever layer it stands


def test_where_adapters_stand(place: Path) -> None:
    def standing(**changes: Any) -> set[str]:
        model = with_adapters(load_checkpoint(place / "snap")[0], section(**changes))
        return {name.rsplit(".", 1)[-1] for name in adapter_layers(model)}

    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert standing() == mlp | {"q_proj", "v_proj", "o_proj"}
    assert standing(skip_k=False) == standing() | {"k_proj"}
    assert standing(mlp_only=True) == mlp


@pytest.mark.parametrize("changes", [{}, {"mode": "sft", "ema": 0.5}, {"dropout": 0.3}], ids=str)
def test_killed_and_resumed_equals_never_stopped(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
) -> None:
    recover(place, tmp_path / "whole", **changes)
    with killed_after(3):
        recover(place, tmp_path / "parts", **changes)
    random.seed(9)  # another process starts elsewhere
    np.random.seed(9)
    torch.manual_seed(9)
    recover(place, tmp_path / "parts", **changes)
    assert "going on after step 2" in capsys.readouterr().err
    for name in OUTPUTS:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_dropout_is_seeded_and_spares_held_out_text(place: Path, tmp_path: Path) -> None:
    none = recover(place, tmp_path / "none")
    one, two = (recover(place, tmp_path / n, dropout=0.5) for n in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / FILES[0]).read_bytes() == (tmp_path / "two" / FILES[0]).read_bytes()
    assert one.initial_loss == none.initial_loss
    assert one.rows[1]["loss"] == none.rows[1]["loss"]  # B is 0: there is nothing to leave out
    assert one.rows[3]["loss"] != none.rows[3]["loss"]
    assert held_out_kd(place, tmp_path / "one/adapter") == pytest.approx(one.best_loss, rel=1e-5)


def test_gradient_checkpointing_gives_the_same(place: Path, tmp_path: Path) -> None:
    plain = recover(place, tmp_path / "plain", dropout=0.3)
    less = recover(place, tmp_path / "less", dropout=0.3, gradient_checkpointing=True)
    assert less.best_loss == pytest.approx(plain.best_loss, rel=1e-5)


def test_what_cannot_be_is_one_line(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "place"))
    write_rows(folder / "plain", folder / "teacher", prompts=False)
    with pytest.raises(InputError, match="plain has a prompt.*alpaca_chat"):
        recover(folder, tmp_path / "out", tokens="plain", mode="sft")
    with pytest.raises(ParamsError, match="rank 17 is above what .*v_proj allows; use at most 16"):
        recover(folder, tmp_path / "out", rank=17)
    with pytest.raises(ParamsError, match="fp16"):
        recover(folder, tmp_path / "out", dtype="fp16")
    make_snapped(folder, baked=True)
    with pytest.raises(MismatchError, match="it is baked.*snap.form to lut"):
        recover(folder, tmp_path / "out")
    (folder / "teacher/tokenizer.json").write_text("{ }")  # another teacher, by its tokenizer
    shutil.copytree(place / "snap", folder / "snap", dirs_exist_ok=True)
    with pytest.raises(MismatchError, match="is not the teacher that the model comes from"):
        recover(folder, tmp_path / "out", mode="text")
    assert not (tmp_path / "out").exists()


def test_targets_are_what_is_quantized(place: Path) -> None:
    model, _ = load_checkpoint(place / "snap")
    assert targets_of(model, section(mlp_only=True)) == ["down_proj", "gate_proj", "up_proj"]
