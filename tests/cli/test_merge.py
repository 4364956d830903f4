"""merge-adapter, and generate with an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.evaluate.samples import generate_texts
from lib.model.adapter import (
    adapter_layers,
    add_adapters,
    change_of,
    load_adapted,
    lora_config,
    save_adapter,
)
from lib.model.checkpoint import load_checkpoint, read_config
from lib.model.load import load_tokenizer
from lib.model.surgery import quantized_layers
from tests.cli.run import lutqat


def make_adapter(snapped: Path, folder: Path, share: float) -> Path:
    """An adapter for MLPs whose change is ``share`` of |W_q|, layer by layer."""
    model, _ = load_checkpoint(snapped)
    add_adapters(model, lora_config(8, 8.0, 0.0, ["gate_proj", "up_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            b = layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape, generator=generator))
            b.mul_(share * layer.get_base_layer().dequantized().norm() / change_of(layer).norm())  # type: ignore[operator]
    save_adapter(model, folder, {"base": read_config(snapped)["fingerprint"]})
    return folder


@pytest.fixture(scope="module")
def adapters(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small`` and ``large``, for the snapped model, whose MLPs have 2 bits."""
    root = tmp_path_factory.mktemp("adapters")
    for name, share in (("small", 0.02), ("large", 1.0)):
        make_adapter(models / "snapped", root / name, share)
    return root


def test_a_small_change_is_refused_at_two_bits(
    models: Path, adapters: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = lutqat("merge-adapter", models / "snapped", adapters / "small", out)
    outcome.refused_with(7, "keep the adapter separate, or use --refit-scales")
    assert "model.layers.1.mlp.down_proj" in outcome.out and "all layers" in outcome.out
    assert not out.exists()


@pytest.mark.parametrize("options", [[], ["--refit-scales"]])
def test_a_large_change_is_merged(
    models: Path, adapters: Path, tmp_path: Path, options: list[str]
) -> None:
    out = tmp_path / "out"
    outcome = lutqat("merge-adapter", models / "snapped", adapters / "large", out, *options)
    assert outcome.code == 0, outcome.err
    model, info = load_checkpoint(out)
    assert info["parent"] == read_config(models / "snapped")["fingerprint"]
    assert info["merged_adapter"]["refit_scales"] == bool(options)
    old = quantized_layers(load_checkpoint(models / "snapped")[0])
    wanted = adapter_layers(load_adapted(models / "snapped", adapters / "large"))
    lost = change = 0.0
    for name, layer in quantized_layers(model).items():
        before = old[name].dequantized()
        if name in wanted:
            aim = before + change_of(wanted[name])
            lost += float((layer.dequantized() - aim).square().sum())
            change += float((aim - before).square().sum())
        else:
            assert torch.equal(layer.dequantized(), before)
        assert layer.weight is None
    total = next(line for line in outcome.out.splitlines() if line.startswith("all layers"))
    assert float(total.split()[-1]) == pytest.approx(lost / change, abs=6e-4)
    assert lutqat("generate", out, "Hi", "--max-tokens", 2).code == 0
    assert lutqat("inspect", out).code == 0


def test_bad_requests(models: Path, adapters: Path, tmp_path: Path) -> None:
    def refused(code: int, text: str, *args: object) -> None:
        lutqat("merge-adapter", *args).refused_with(code, text)

    snapped, large, out = models / "snapped", adapters / "large", tmp_path / "out"
    refused(4, "was trained on the checkpoint", models / "trained", large, out)
    refused(3, "not a lutqat checkpoint", models / "teacher", large, out)
    refused(3, "holds no adapter", snapped, tmp_path, out)
    refused(3, "is the source itself", snapped, large, snapped)
    refused(3, "no lutqat checkpoint", snapped, large, models / "teacher")
    assert not out.exists()


def test_generate_shows_both_answers(models: Path, adapters: Path) -> None:
    snapped, large = models / "snapped", adapters / "large"
    outcome = lutqat("generate", snapped, "Hi", "--max-tokens", 9, "--adapter", large)
    assert outcome.code == 0, outcome.err
    tokenizer = load_tokenizer(snapped)
    plain, adapted = (
        generate_texts(model, tokenizer, ["Hi"], 9)[0]
        for model in (load_checkpoint(snapped)[0], load_adapted(snapped, large))
    )
    assert plain != adapted
    assert outcome.out == f"[without the adapter]\n{plain}\n[with the adapter]\n{adapted}\n"


def test_generate_refuses_what_is_no_adapter(models: Path, adapters: Path, tmp_path: Path) -> None:
    def refused(code: int, text: str, folder: Path, adapter: Path) -> None:
        lutqat("generate", folder, "Hi", "--adapter", adapter).refused_with(code, text)

    refused(3, "holds no adapter", models / "snapped", tmp_path)
    refused(4, "was trained on the checkpoint", models / "trained", adapters / "large")
