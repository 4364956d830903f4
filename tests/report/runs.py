"""A small finished experiment as files, and a page taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from lib.report.experiment import read_experiment
from lib.report.page import render
from lib.report.source import workspace

LAYERS = [
    f"model.layers.{block}.{kind}"
    for block in range(2)
    for kind in ("self_attn.q_proj", "mlp.down_proj")
]
STAGES: dict[str, list[str]] = {  # stage -> its outputs that DVC caches
    "teacher": [],
    "quant": [],
    "sensitivity": [],
    "scales": ["runs/scales/log.csv"],
    "weights": ["runs/weights/log.csv"],
    "finetune": ["runs/finetune/log.csv"],
    "finetune_q2": ["runs/finetune_q2/log.csv"],
    "snap": [],
    "recover": [],
    "ane_check": [],
    "export": [],
    "evaluate": [],
}
PARAMS = {
    "teacher": {"source": "package:tiny_teacher"},
    "quant": {"lut_size": 16, "attention_lut_size": 0, "attention": True},
    "scales": {"steps": 4, "rates": {"weight": 0.0, "lut": 3e-05}},
    "convert": {"lut_size": 4, "attention_lut_size": 16},
    "recover": {"steps": 0},
    "evaluate": {"prompts": ["What is 2+2?"]},
}


def ladder(models: dict[str, float]) -> dict[str, Any]:
    """ladder.json of models with these perplexities; the first is the teacher."""
    first = next(iter(models.values()))
    rows = [
        {
            "model": name,
            "perplexity": value,
            "ratio": value / first,
            "kl": 0.0 if name == "teacher" else value / 100,
            "top1": 1.0 if name == "teacher" else 0.75,
            "bits_per_weight": 16.0 if name == "teacher" else 4.5,
            "bits_per_layer_weight": None if name == "teacher" else 2.25,
            "packed_mb": 200.0 if name == "teacher" else 50.0,
            "folder_mb": None,
        }
        for name, value in models.items()
    ]
    machine = {"platform": "Linux", "device": "cpu", "threads": 2, "torch": "2"}
    return {"scored_tokens": 1000, "scored_positions": 500, "rows": rows, "machine": machine}


def ane_report(passed: bool = True) -> dict[str, Any]:
    """report.json of the gate."""
    operations = {
        name: {"mm": {"max_abs": 10.0 + n, "headroom": 6550.4 / (n + 1), "overflows": 0}}
        for n, name in enumerate(LAYERS)
    }
    compared = {
        "tokens": 32,
        "kl": 1.25e-05,
        "top1": 1.0,
        "perplexity": 20.5,
        "float32_perplexity": 20.25,
        "non_finite_logits": 0,
        "relative_errors": {name: 1e-3 * (n + 1) for n, name in enumerate(LAYERS)},
    }
    failure = {"layer": LAYERS[0], "form": "baked", "kind": "x", "why": "overflows", "mode": "wide"}
    return {
        "passed": passed,
        "failures": [] if passed else [failure],
        "warnings": ["some entries are subnormal"],
        "headroom": {"operations": {"baked": operations}},
        "against_float32": {"forms": {"baked": {"wide": compared}}},
        "graph": [{"name": "finite mask", "status": "ok", "found": "mask -10000"}],
        "ane": "Emulated; not run on an ANE.",
    }


def export_report() -> dict[str, Any]:
    """report.json of the export."""
    check = {"tokens": 8, "kl": 2e-06, "top1": 1.0, "largest": 30.5, "from_model": 0.02}
    return {
        "passed": True,
        "statement": "Nothing was run by Core ML.",
        "faults": [],
        "target": "iOS18",
        "fp16_megabytes": 200.0,
        "folders": {"coreml": 61.5},
        "logits": {"coreml": check},
        "audit": {
            "layers": 4,
            "dense": 1,
            "bits_per_weight": 2.5,
            "megabytes": {"total": 60.25},
            "operations": {"conv": 4},
        },
    }


def pipeline() -> dict[str, Any]:
    """dvc.yaml, without dependencies."""
    stages: dict[str, Any] = {}
    for stage, cached in STAGES.items():
        folder = "data" if stage == "teacher" else "runs"
        metrics = [{f"{folder}/{stage}/metrics.json": {"cache": False}}]
        plots = [{path: {"x": "step", "y": "val_kd_loss"}} for path in cached]
        outs = ["runs/scales/model"] if stage == "scales" else []
        stages[stage] = {"cmd": stage, "metrics": metrics, "plots": plots, "outs": outs}
    return {"stages": stages}


def metrics(stage: str, best: float) -> dict[str, Any]:
    """metrics.json of a stage."""
    values: dict[str, Any] = {"initial_kd": 2.5, "best_kd": best, "steps": 4}
    if stage == "teacher":
        values = {"source": "package:tiny_teacher", "parameters": 123456}
    if stage == "ane_check":
        values = {"passed": True, "worst_headroom": 2.84888253}
    return {stage: values}


def write_runs(root: Path, *, best: float = 1.234567, snapped: float = 34.448) -> Path:
    """A finished experiment in ``root``; recover was not run."""
    models = {"teacher": 19.7, "quant": 25.5, "finetune": 21.75, "finetune_q2": 34.5}
    models["snap"] = snapped
    answers = {name: [f"The answer of {name}."] for name in models}
    files: dict[str, Any] = {
        "dvc.yaml": pipeline(),
        "params.yaml": PARAMS,
        "runs/evaluate/ladder.json": ladder(models),
        "runs/evaluate/samples.json": {"prompts": ["What is 2+2?"], "answers": answers},
        "runs/sensitivity/scores.json": {name: 10.0**-n for n, name in enumerate(LAYERS)},
        "runs/weights/grid.json": {"layers": {name: {"distance": 0.25} for name in LAYERS}},
        "runs/ane_check/report.json": ane_report(),
        "runs/export/report.json": export_report(),
        "runs/scales/model/config.json": {
            "fingerprint": "f00dfeedf00dfeed",
            "info": {"stage": "scales", "teacher": "87e357db2e66e3d3", "result": {"steps": 4}},
        },
    }
    for stage in STAGES:
        folder = "data" if stage == "teacher" else "runs"
        if stage != "recover":
            files[f"{folder}/{stage}/metrics.json"] = metrics(stage, best)
    for name, value in files.items():
        write(root / name, json.dumps(value))
    for stage in ("scales", "weights", "finetune", "finetune_q2"):
        log = f"step,loss,kd_loss,val_kd_loss\n0,,,2.5\n2,2.25,2.25,\n4,2.0,2.0,{best}\n"
        write(root / f"runs/{stage}/log.csv", log)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def page_of(root: Path) -> str:
    """The page of the experiment in ``root``."""
    return render(read_experiment(workspace(root)))


class Page(HTMLParser):
    """Elements and text of a page; every tag must be closed where it should be."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]) and data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def named(self, tag: str) -> Iterator[dict[str, str]]:
        """Attributes of every element of that name."""
        return (attributes for name, attributes in self.elements if name == tag)

    def exact(self) -> list[str]:
        """The numbers that the page holds with all their digits."""
        return [attributes["value"] for attributes in self.named("data")]
