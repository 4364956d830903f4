"""Whole reference checkpoints: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.base.errors import InputError, LutqatError, MismatchError
from lib.model.checkpoint import load_checkpoint, save_checkpoint
from lib.model.foreign import import_reference
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.model.surgery import quantized_layers
from tests.model.reference_checkpoints import (
    Tensors,
    layer_of,
    save_base,
    state_dict,
    uniform,
    v1_layer,
    v1_weight,
    v2_indices,
    v2_layer,
    v2_weight,
)

IDS = torch.arange(3, 40)[None]
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


def v1_state(base: Path) -> Tensors:
    return state_dict(load_causal_lm(base), v1_layer, uniform(16))


def v2_state(base: Path, size: int = 4) -> Tensors:
    tensors = state_dict(load_causal_lm(base), v2_layer, uniform(size))
    for name in [key.removesuffix(".lut") for key in tensors if key.endswith(".lut")]:
        tensors[f"{name}._indices"] = v2_indices(layer_of(tensors, name), {})
    return tensors


def write(folder: Path, content: Any, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "model_state_dict.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model_state_dict.pt"


@torch.no_grad()
def reference_logits(base: Path, tensors: Tensors, weight_of: Any) -> Tensor:
    """The base model with the reference's weights in place of its own."""
    model = load_causal_lm(base)
    for name, parameter in model.named_parameters():
        layer = layer_of(tensors, name.removesuffix(".weight"))
        if "lut" in layer:
            parameter.copy_(weight_of(layer))
        elif name in tensors:
            parameter.copy_(tensors[name])
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("state", "weight_of", "form"), [(v1_state, v1_weight, "V1"), (v2_state, v2_weight, "V2")]
)
def test_model_computes_what_the_reference_does(
    base: Path, tmp_path: Path, state: Any, weight_of: Any, form: str
) -> None:
    tensors = state(base)
    tensors["model.norm.weight"] *= 1.5  # the file's tensors win over the base's
    model, info = import_reference(write(tmp_path / "run", tensors), base)
    expected = reference_logits(base, tensors, weight_of)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len(quantized_layers(model)) == 14
    assert info["form"] == form
    assert info["teacher"] == folder_fingerprint(base)
    assert info["tensors_from_base"] == 0
    save_checkpoint(model, tmp_path / "ours", tokenizer_from=base, info=info)
    again, kept = load_checkpoint(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, found)
    assert kept == info


@pytest.mark.parametrize("wrapper", ["model_state_dict", "model"])
def test_wrapped_layers_alone_take_the_rest_from_the_base(
    base: Path, tmp_path: Path, wrapper: str
) -> None:
    tensors = {name: value for name, value in v2_state(base).items() if "_proj." in name}
    wrapped = {wrapper: tensors, "config": {"version": "v2"}}
    model, info = import_reference(write(tmp_path / "run", wrapped), base)
    norms_embedding_head = 5 + 1 + 1
    assert info["tensors_from_base"] == norms_embedding_head
    expected = reference_logits(base, tensors, v2_weight)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_config_beside_the_file_counts(base: Path, tmp_path: Path) -> None:
    tensors = v1_state(base)
    generator = torch.Generator().manual_seed(0)
    for name in [key for key in tensors if key.endswith("_proj.weight")]:
        tensors[name] = uniform(16)[torch.randint(16, tensors[name].shape, generator=generator)]
    file = write(tmp_path / "run", tensors, {"snapped_mode": "lut", "group_size": 24})
    model, _ = import_reference(file.parent, base)  # the folder will do
    layer = quantized_layers(model)[QUERY]
    expected = v1_weight(layer_of(tensors, QUERY), "lut")
    assert torch.allclose(layer.dequantized(), expected, rtol=1e-5, atol=1e-6)
    assert layer.spec.group_size == 24
    write(tmp_path / "run", tensors, {"snapped_mode": "baked"})
    with pytest.raises(MismatchError, match="LUT values times scales"):
        import_reference(file, base)


def test_attention_may_be_unquantized(base: Path, tmp_path: Path) -> None:
    tensors = v2_state(base)
    for name in [key for key in tensors if "self_attn" in key]:
        if not name.endswith(".weight"):
            del tensors[name]
    model, _ = import_reference(write(tmp_path / "run", tensors), base)
    assert len(quantized_layers(model)) == 6


class Hostile:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was-executed"),)


@pytest.mark.parametrize("content", [Hostile(), {"model": torch.nn.Linear(2, 2)}])
def test_objects_are_refused_unread(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "run", content)
    with pytest.raises(InputError, match="is refused"):
        import_reference(file, base)
    assert not Path("was-executed").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\x03\x04 truncated"])
def test_garbage_is_refused(base: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt is refused"):
        import_reference(file, base)
    with pytest.raises(InputError, match="does not exist"):
        import_reference(tmp_path / "y.pt", base)


def without(*words: str) -> Any:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(w in n for w in words)}


def changed(**values: Any) -> Any:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return lambda tensors: {**tensors, **named}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (without("scale_A", "scale_B", "rank_mag", "lut"), InputError, "0 quantized layers"),
        (without(f"{QUERY}."), InputError, rf"lacks 1 of the 14 .*{QUERY}"),
        (without("layers.0.mlp"), InputError, "lacks 3 of the 14"),
        (without(f"{QUERY}.weight"), MismatchError, "weight is missing"),
        (without(f"{QUERY}.lut"), InputError, rf"{QUERY}.lut has 0"),
        (changed(lm_head__scale_A=torch.ones(288, 2)), MismatchError, "lm_head is quantized"),
        (changed(model__strange=torch.ones(2)), MismatchError, "model.strange"),
        (changed(model__norm__weight=torch.ones(9)), MismatchError, r"\[9\].*\[64\]"),
        (changed(step=3), InputError, "step is no tensor but int"),
        (changed(lm_head__full_scales=torch.ones(2)), InputError, "scale per weight"),
        (lambda tensors: [1, 2], InputError, "no state dict but list"),
        (lambda tensors: {}, InputError, "no state dict"),
    ],
)
def test_incomplete_or_foreign_files(
    base: Path, tmp_path: Path, change: Any, error: type[LutqatError], text: str
) -> None:
    file = write(tmp_path / "run", change(v2_state(base)))
    with pytest.raises(error, match=text) as caught:
        import_reference(file, base)
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = v2_state(base)
    tensors[f"{QUERY}.weight"] = torch.ones(64, 32)
    with pytest.raises(MismatchError, match="give the base model"):
        import_reference(write(tmp_path / "run", tensors), base)
    with pytest.raises(InputError, match="holds no"):
        import_reference(tmp_path / "run", tmp_path / "nothing")
