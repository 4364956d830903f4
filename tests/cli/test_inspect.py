"""inspect."""

from __future__ import annotations

from pathlib import Path

from lib.api import load_teacher, quantize, save
from lib.model.checkpoint import load_checkpoint, read_config
from lib.model.load import folder_fingerprint
from lib.model.size import model_size
from lib.model.surgery import quantized_layers
from lib.params.training import Rates, TrainConfig
from lib.train.average import PLAIN, save_trained, snapshot
from lib.train.roles import select
from tests.cli.run import lutqat


def rows(text: str) -> dict[str, str]:
    """First cell of each line -> the rest (cells are two spaces apart)."""
    cells = [line.strip().split("  ", 1) for line in text.splitlines() if "  " in line.strip()]
    return {cell[0]: " ".join(cell[1].split()) for cell in cells}


def test_layers_and_totals(models: Path) -> None:
    folder = models / "snapped"
    model, info = load_checkpoint(folder)
    found = rows(lutqat("inspect", folder).out)
    layers = quantized_layers(model)
    assert sum(name in found for name in layers) == len(layers) == 14
    name = "model.layers.1.mlp.up_proj"
    a, b = layers[name].factors()
    scale = a @ b
    assert found[name] == (
        "160 x 64 2 2 lowrank (snapped) -1 -0.3333 0.3333 1 "
        f"{float(scale.min()):.3g} .. {float(scale.max()):.3g}"
    )
    assert " 4 2 lowrank (snapped) -1 .. 1 (16) " in found["model.layers.0.self_attn.k_proj"]
    size = model_size(model)
    assert found["bits per weight, all in"] == f"{size.bits_per_weight:.3f}"
    assert found["bits per quantized weight"] == f"{size.bits_per_layer_weight:.3f}"
    assert found["stage"] == "snap"
    assert found["teacher"] == info["teacher"] == folder_fingerprint(models / "teacher")
    assert found["fingerprint"] == read_config(folder)["fingerprint"]


def test_the_rank_of_group_scales_is_the_number_of_groups(models: Path, tmp_path: Path) -> None:
    teacher, tokenizer = load_teacher(models / "teacher")
    save(quantize(teacher, scale="group", group_size=24, rank=9), tokenizer, tmp_path / "m")
    found = rows(lutqat("inspect", tmp_path / "m").out)
    assert found["model.layers.1.mlp.up_proj"].startswith("160 x 64 4 3 group ")
    assert found["model.layers.1.mlp.down_proj"].startswith("64 x 160 4 7 group ")


def test_plain_parameters_lie_inside_the_folder_of_averaged_ones(
    models: Path, tmp_path: Path
) -> None:
    model, info = load_checkpoint(models / "trained")
    plain = snapshot(select(model, TrainConfig(rates=Rates(weight=1e-4))))
    save_trained(model, plain, tmp_path / "m", models / "trained", info)
    for folder, averaged in ((tmp_path / "m", "True"), (tmp_path / "m" / PLAIN, "False")):
        found = rows(lutqat("inspect", folder).out)
        assert found["quantized layers"] == "14" and found["averaged"] == averaged


def test_teacher_and_baked_have_no_layers(models: Path) -> None:
    for kind, stage in (("teacher", "teacher"), ("baked", "snap")):
        found = rows(lutqat("inspect", models / kind).out)
        assert found["quantized layers"] == "0"
        assert found["bits per weight, all in"] == "16.000"
        assert found["stage"] == stage
