"""profiles/qwen3-0.6b.yaml up to where the hub is needed: its settings on a local Qwen3 model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import stages.cache
import stages.calibrate
import stages.convert
import stages.finetune_q2
import stages.quant
import stages.scales
import stages.snap
import stages.teacher
import stages.tokens
from lib.model.checkpoint import load_checkpoint
from lib.model.load import load_causal_lm
from lib.model.surgery import is_mlp, quantized_layers
from lib.params.profile import apply_profile
from lib.text.sequences import TokenSet

ROOT = Path(__file__).parents[2]

# What the hub would bring, and sizes for seconds; every other key is the profile's.
LOCAL: dict[str, Any] = {
    "teacher": {"source": "random:qwen3", "revision": None},
    "cache": {"shard_sequences": 16, "negatives": 128},
    "calibrate": {"sequences": 4},
    "scales": {"steps": 2, "batch_size": 2, "dtype": "fp32", "eval_sequences": 4},
    "convert": {"eval_sequences": 4},
    "finetune_q2": {
        "steps": 2,
        "batch_size": 2,
        "dtype": "fp32",
        "eval_sequences": 4,
        "warmup_steps": 1,
    },
    "run": {"device": "cpu"},
}


@pytest.fixture
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, name)
    shutil.copytree(ROOT / "tests" / "data", Path("data", "local"))
    apply_profile("qwen3-0.6b", Path("params.yaml"), ROOT / "profiles")
    params = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text())
    for section, values in LOCAL.items():
        params[section].update(values)
    tokens = params["tokens"]
    tokens["train"][0].update(source="path:data/local/instructions.json", sequences=24)
    tokens["test"] = [{"source": "path:data/local/prose.txt"}]
    tokens.update(val_fraction=0.2, test_fraction=0.1, val_sequences=4, test_sequences=4)
    Path("params.yaml").write_text(json.dumps(params))


@pytest.mark.usefixtures("_workspace")
def test_the_profile_runs_on_a_local_qwen3() -> None:
    teacher, tokens, cache = Path("data/teacher"), Path("data/tokens"), Path("data/cache")
    stages.teacher.main(teacher)
    assert load_causal_lm(teacher).config.model_type == "qwen3"
    stages.tokens.main(teacher, tokens)
    assert TokenSet(tokens / "train").input_ids.shape[1] == 128
    stages.cache.main(teacher, tokens, cache)
    stages.calibrate.main(teacher, tokens, Path("runs/calibrate"))
    moments = Path("runs/calibrate/moments.safetensors")
    stages.quant.main(teacher, moments, Path("runs/quant"))
    quantized = Path("runs/quant/model")
    stages.scales.main(quantized, cache, teacher, tokens, Path("no scores"), Path("runs/scales"))
    stages.convert.main(Path("runs/scales/model"), teacher, cache, moments, Path("runs/convert"))
    converted = json.loads(Path("runs/convert/metrics.json").read_text())["convert"]
    assert converted["kd_after"] < converted["kd_reference_rule"]
    stages.finetune_q2.main(
        Path("runs/convert/model"), cache, teacher, tokens, Path("runs/finetune_q2")
    )
    with Path("runs/finetune_q2/log.csv").open() as log:
        assert [row["step"] for row in csv.DictReader(log)] == ["0", "2"]
    stages.snap.main(Path("runs/finetune_q2/model"), Path("runs/snap"))
    model, _ = load_checkpoint(Path("runs/snap/model"))
    for name, layer in quantized_layers(model).items():
        wanted = (4, 32) if is_mlp(name) else (16, 8)
        assert (layer.spec.lut_size, layer.spec.rank) == wanted
