"""The gate's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lib.ane.check import Limits, run_check
from lib.ane.report import metrics, to_json, to_markdown, write_report
from lib.model.surgery import quantized_layers
from tests.ane.tiny import snapped_model, token_sequences

LIMITS = Limits(max_kl=0.02, min_top1=0.85)
FILES = ("report.json", "report.md", "headroom.svg", "metrics.json")


def test_files_of_a_sound_model_are_the_same_twice(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        result = run_check(snapped_model(), token_sequences(), LIMITS)
        write_report(result, tmp_path / folder)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    report = json.loads((tmp_path / "one/report.json").read_text())
    assert report["passed"] is True
    assert "not run on an ANE" in report["statement"]
    text = (tmp_path / "one/report.md").read_text()
    assert "FP16 check: passed" in text
    assert "not run on an ANE" in text
    assert "| factored |" in text
    values = json.loads((tmp_path / "one/metrics.json").read_text())["ane_check"]
    assert values["passed"] is True
    assert {"kl_factored", "kl_baked", "top1_factored", "worst_headroom"} <= set(values)
    assert values["worst_headroom"] > 10


def test_report_of_a_broken_model_is_valid_json_and_names_the_layer(tmp_path: Path) -> None:
    model = snapped_model()
    name = "model.layers.0.self_attn.v_proj"
    with torch.no_grad():
        quantized_layers(model)[name].lut[0] = float("nan")
    result = run_check(model, token_sequences(), LIMITS)
    write_report(result, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "FAILED" in text
    assert name in text
    assert metrics(result)["ane_check"]["kl_baked"] is None
    assert to_json(result)["failures"][0]["layer"] == name


def test_markdown_lists_layers_by_headroom() -> None:
    result = run_check(snapped_model(), token_sequences(), LIMITS)
    table = to_markdown(result).split("## Least headroom, baked form")[1].split("## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")][2:]
    peaks = [float(row[3]) for row in rows]
    assert len(peaks) > 3
    assert peaks == sorted(peaks, reverse=True)
    assert not any("norm" in row[1] for row in rows)
