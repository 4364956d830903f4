"""The snap stage: smaller files that compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from lib.model.surgery import quantized_layers
from lib.snap.run import snap_stage
from tests.tiny_models import logits_of, quantized


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("size", [4, 16])
def test_lut_form(tmp_path: Path, family: str, size: int) -> None:
    model = quantized(family, lut_size=size)
    source, out = tmp_path / "m", tmp_path / "out"
    save_checkpoint(model, source, tokenizer_from=source, info={"stage": "x", "teacher": "t"})
    metrics = snap_stage(source, out, baked=False)
    assert metrics["largest_change"] == 0.0 and metrics["layers"] == 14
    loaded, info = load_checkpoint(out / "model")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert info["stage"] == "snap" and info["teacher"] == "t"
    assert info["parent"] == read_config(source)["fingerprint"]
    assert json.loads((out / "metrics.json").read_text()) == {"snap": metrics}
    # every stored bit is counted, and nothing else is stored
    stored = load_file(out / "model/model.safetensors")
    bits = sum(8 * t.numel() * t.element_size() for t in stored.values())
    weights = sum(p.numel() for n, p in model.named_parameters() if ".scale." not in n)
    weights -= 14 * size
    assert metrics["bits_per_weight"] == pytest.approx(bits / weights)
    inside = [f"{name}." for name in quantized_layers(model)]
    layer_bits = sum(
        8 * t.numel() * t.element_size()
        for name, t in stored.items()
        if any(name.startswith(prefix) for prefix in inside)
    )
    quantized_weights = sum(x.indices.numel() for x in quantized_layers(model).values())
    assert metrics["bits_per_quantized_weight"] == pytest.approx(layer_bits / quantized_weights)
    size_before = (source / "model.safetensors").stat().st_size
    assert (out / "model/model.safetensors").stat().st_size < 0.5 * size_before


def test_snapping_a_snapped_checkpoint_changes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "m"
    save_checkpoint(quantized(), source, tokenizer_from=source, info={})
    snap_stage(source, tmp_path / "one", baked=False)
    again = snap_stage(tmp_path / "one/model", tmp_path / "two", baked=False)
    assert again["largest_change"] == 0.0
    weights = "model/model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()


def test_baked_form(tmp_path: Path) -> None:
    model = quantized()
    source = tmp_path / "m"
    save_checkpoint(model, source, tokenizer_from=source, info={})
    metrics = snap_stage(source, tmp_path / "out", baked=True)
    loaded, _ = load_checkpoint(tmp_path / "out/model")
    assert not quantized_layers(loaded)
    stored = load_file(tmp_path / "out/model/model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert metrics["bits_per_weight"] is None
    assert 0 < metrics["largest_change"] < 1e-2
    # what remains is the rounding of each weight to half an FP16 spacing
    error = (logits_of(loaded) - logits_of(model)).norm() / logits_of(model).norm()
    assert 0 < error < 2**-8
