"""convert-checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.api import load_teacher, quantize, save
from lib.model.checkpoint import load_checkpoint
from lib.model.linear import ChannelScale, DirectionalScale, GroupScale, LowRankScale
from lib.model.load import load_causal_lm
from lib.model.surgery import quantized_layers
from tests.cli.run import lutqat
from tests.model.reference_checkpoints import state_dict, uniform, v1_layer, v1_weight, v2_layer

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("form", "kind"),
    [("lowrank", LowRankScale), ("group", GroupScale), ("channel", ChannelScale)],
)
def test_change_of_form_is_exact(models: Path, tmp_path: Path, form: str, kind: type) -> None:
    teacher, tokenizer = load_teacher(models / "teacher")
    made = quantize(teacher, ste_fp16=False, rank=3, scale=form, group_size=24)
    save(made, tokenizer, tmp_path / "v1")
    outcome = lutqat("convert-checkpoint", tmp_path / "v1", tmp_path / "v2")
    assert outcome.code == 0, outcome.err
    assert "14 quantized layers" in outcome.out
    old, new = (load_checkpoint(tmp_path / name)[0] for name in ("v1", "v2"))
    for (name, one), other in zip(
        quantized_layers(old).items(), quantized_layers(new).values(), strict=True
    ):
        assert isinstance(one.scale, kind), name
        assert isinstance(other.scale, DirectionalScale), name
        assert torch.equal(one.indices, other.indices)
        assert one.weight is not None and other.weight is not None
        assert torch.equal(one.weight, other.weight)
        a, b = one.factors()
        assert other.spec.rank == b.shape[0]  # no rank is added
        lost = (one.dequantized() - other.dequantized()).abs()
        assert (lost <= 16 * EPS * (a.abs() @ b.abs())).all()


def test_fp16_rounding_is_reported(models: Path, tmp_path: Path) -> None:
    out = lutqat("convert-checkpoint", models / "trained", tmp_path / "v2").out
    change = float(out.split("W_q: ")[1].split()[0])
    assert 1e-5 < change < 3 * 2**-11 * 4  # three rounded factors in ranks of opposite signs
    again = lutqat("convert-checkpoint", tmp_path / "v2", tmp_path / "v3").out
    assert "W_q: 0.0e+00" in again


@pytest.mark.parametrize(
    ("kind", "options", "form"),
    [
        (v1_layer, [], DirectionalScale),
        (v1_layer, ["--keep-form"], LowRankScale),
        (v2_layer, [], DirectionalScale),
    ],
)
def test_reference_files(
    models: Path, tmp_path: Path, kind: object, options: list[str], form: type
) -> None:
    base = models / "teacher"
    tensors = state_dict(load_causal_lm(base), kind, uniform(16))
    torch.save(tensors, tmp_path / "x.pt")
    out = tmp_path / "out"
    outcome = lutqat("convert-checkpoint", tmp_path / "x.pt", out, "--base", base, *options)
    assert outcome.code == 0, outcome.err
    layers = quantized_layers(load_checkpoint(out)[0])
    assert all(isinstance(layer.scale, form) for layer in layers.values())
    if kind is v1_layer:
        name = "model.layers.0.mlp.down_proj"
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}
        a, b = layers[name].factors()
        lost = (layers[name].dequantized() - v1_weight(own)).abs()
        assert (lost <= 16 * EPS * (a.abs() @ b.abs())).all()
    assert lutqat("generate", out, "Hi", "--max-tokens", 2).code == 0


def test_bad_requests(models: Path, tmp_path: Path) -> None:
    def refused(code: int, text: str, *args: object) -> None:
        lutqat("convert-checkpoint", *args).refused_with(code, text)

    base, garbage, objects = models / "teacher", tmp_path / "garbage.pt", tmp_path / "objects.pt"
    garbage.write_bytes(b"no tensors at all")
    torch.save(torch.nn.Linear(2, 2), objects)
    torch.save({"lm_head.weight": torch.ones(2)}, tmp_path / "plain.pt")
    out = tmp_path / "out"
    refused(3, "does not exist", tmp_path / "none", out)
    refused(3, "give its base model", garbage, out)
    refused(3, "garbage.pt is refused", garbage, out, "--base", base)
    refused(3, "objects.pt is refused", objects, out, "--base", base)
    refused(3, "0 quantized layers", tmp_path / "plain.pt", out, "--base", base)
    refused(3, "neither a lutqat checkpoint", base, out, "--base", base)
    refused(4, "snapped or baked", models / "snapped", out)
    refused(4, "snapped or baked", models / "baked", out)
    refused(3, "--base", models / "trained", out, "--base", base)
    refused(3, "is the source itself", models / "trained", models / "trained")
    refused(3, "no lutqat checkpoint", models / "trained", base)
    assert not out.exists()
    assert load_causal_lm(base) is not None
