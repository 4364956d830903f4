"""grid.json and grid.svg: every quantized layer and the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.model.grid import LayerGrid
from lib.model.surgery import quantized_layers
from lib.train.grid_report import grid_report
from tests.tiny_models import quantized


def test_files_hold_every_layer_and_are_the_same_twice(tmp_path: Path) -> None:
    model = quantized(lut_size=4)
    report = grid_report(model, 0.1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        grid_report(model, 0.1).write(tmp_path / name)
    for file in ("grid.json", "grid.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    values = json.loads((tmp_path / "one/grid.json").read_text())
    layers = quantized_layers(model)
    assert values["atol"] == 0.1 and list(values["layers"]) == list(layers)
    for name, layer in layers.items():
        distance, hits, outside = LayerGrid(layer).sums(0.1).tolist()
        assert layer.weight is not None
        count = layer.weight.numel()
        assert values["layers"][name] == pytest.approx(
            {
                "distance": distance / count,
                "hit_rate": hits / count,
                "sat_rate": outside / count,
            }
        )
    overall = values["overall"]
    assert report.metrics() == {
        "grid_distance": overall["distance"],
        "hit_rate": overall["hit_rate"],
        "sat_rate": overall["sat_rate"],
    }
    svg = (tmp_path / "one/grid.svg").read_text()
    assert svg.startswith("<?xml") and svg.count('id="axes_') == 2
