"""The gate's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib.ane.check import CheckResult, run_check
from lib.ane.figure import draw_headroom
from lib.ane.norms import NormForm
from lib.ane.page import to_markdown
from lib.ane.products import Mode
from lib.ane.report import metrics, to_deploy, to_json, write_report
from lib.ane.spec import Remedy
from lib.model.surgery import quantized_layers
from tests.ane.tiny import check_spec, snapped_model, token_sequences, with_large_residual
from tests.architecture import load_yaml, outputs_of

FILES = ("report.json", "report.md", "headroom.svg", "deploy.json", "metrics.json")
ROOT = Path(__file__).parents[2]
SECTIONS = (
    "1. Constants",
    "2. Headroom per operation",
    "3. Against float32",
    "4. Graph facts",
    "5. Package",
    "6. Not run on an ANE",
)


def _sound() -> CheckResult:
    return run_check(snapped_model(), token_sequences(), check_spec(modes=tuple(Mode)))


def test_files_of_a_sound_model_are_the_same_twice(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_report(_sound(), tmp_path / folder)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    report = json.loads((tmp_path / "one/report.json").read_text())
    assert report["passed"] is True
    assert report["alpha"] == 1.0
    assert "not run on an ANE" in report["ane"]
    assert set(report["against_float32"]["forms"]["factored"]) == {"wide", "bounded", "partial"}
    assert report["against_float32"]["forms"]["factored"]["bounded"]["same_as"] == "wide"
    deployed = json.loads((tmp_path / "one/deploy.json").read_text())
    assert deployed == {"alpha": 1.0, "norm": "prescaled"}
    values = json.loads((tmp_path / "one/metrics.json").read_text())["ane_check"]
    assert values["passed"] is True
    assert values["alpha"] == 1.0
    assert {"kl_factored", "kl_baked", "top1_factored", "kl_baked_partial"} <= set(values)
    assert values["worst_headroom"] > 10


def test_the_pipeline_declares_every_file(tmp_path: Path) -> None:
    """An output that dvc.yaml does not list is left stale."""
    write_report(_sound(), tmp_path)
    stage = load_yaml(ROOT / "dvc.yaml")["stages"]["ane_check"]
    assert {f"runs/ane_check/{path.name}" for path in tmp_path.iterdir()} == set(outputs_of(stage))


def test_the_page_has_the_six_sections() -> None:
    text = to_markdown(_sound())
    assert "FP16 check: passed" in text
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert tuple(headings[-6:]) == SECTIONS
    assert "lutqat mac-check PACKAGE" in text.split("## 6.")[1]
    assert "runs/export/report.md" in text.split("## 5.")[1]
    assert "bounded was not run again for factored and baked" in text
    assert "| factored | partial |" in text


def test_report_of_a_broken_model_is_valid_json_and_names_the_layer(tmp_path: Path) -> None:
    model = snapped_model()
    name = "model.layers.0.self_attn.v_proj"
    with torch.no_grad():
        quantized_layers(model)[name].lut[0] = float("nan")
    result = run_check(model, token_sequences(), check_spec())
    write_report(result, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "FAILED" in text
    assert name in text
    assert metrics(result)["ane_check"]["kl_baked"] is None
    assert to_json(result)["failures"][0]["layer"] == name


def test_markdown_lists_layers_by_headroom() -> None:
    table = to_markdown(_sound()).split("### Baked form")[1].split("## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")][2:]
    peaks = [float(row[3]) for row in rows if not row[5].strip()]
    products = [float(row[3]) for row in rows if row[5].strip()]
    assert len(peaks) > 3 and len(products) > 3
    assert peaks == sorted(peaks, reverse=True)
    assert products == sorted(products, reverse=True)
    assert not any("norm" in row[1] for row in rows)


@pytest.mark.parametrize("remedy", Remedy)
def test_the_remedy_is_in_the_report(remedy: Remedy) -> None:
    spec = check_spec(norm=NormForm.PLAIN, remedy=remedy)
    result = run_check(with_large_residual(), token_sequences(), spec)
    report, text = to_json(result), to_markdown(result)
    deployed = to_deploy(result)
    assert metrics(result)["ane_check"]["alpha"] == report["alpha"] == deployed["alpha"]
    assert deployed["norm"] == "plain"
    assert report["headroom"]["norms"]["model.norm"]["plain_norm_overflows"] is (
        remedy is Remedy.NONE
    )
    if remedy is Remedy.NONE:
        assert report["remedy"] is None
        assert "ane_check.remedy: alpha" in text
        return
    assert report["alpha"] == report["remedy"]["alpha"] == deployed["alpha"] < 1
    assert report["remedy"]["before"]
    assert report["remedy"]["after"] == []
    assert f"## Remedy: alpha {report['alpha']:g}" in text
    assert "input_layernorm" in text.split("## Remedy")[1].split("## ")[0]


def test_the_figure_shows_both_limits() -> None:
    above, below = draw_headroom(_sound()).axes
    assert "65504" in above.get_ylabel()
    assert "32752" in below.get_ylabel()
    # each form has its points; a layer's headroom is at least that of its products
    for axes in (above, below):
        assert [line.get_label() for line in axes.lines][:2] == ["factored", "baked"]
        assert min(axes.lines[1].get_ydata()) > 1
    assert len(below.lines[1].get_ydata()) >= 15  # 14 projections and the head
