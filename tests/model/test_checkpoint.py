"""Checkpoints load what was saved, bit for bit, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.base.errors import CorruptError, InputError, LutqatError, MismatchError
from lib.base.files import fingerprint, sha256_file
from lib.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from lib.model.surgery import bake, quantized_layers
from lib.quant.spec import Codebook, ScaleForm
from lib.snap.snap import snap_model
from tests.tiny_models import logits_of, quantized, same, state_of, tiny_model

LAYER = "model.layers.1.self_attn.q_proj"


def save(model: Any, folder: Path, **options: Any) -> Path:
    save_checkpoint(model, folder, tokenizer_from=folder, info={"stage": "x"}, **options)
    return folder


@given(
    st.sampled_from(["llama", "qwen3", "qwen2"]),
    st.sampled_from(list(ScaleForm)),
    st.sampled_from(list(Codebook)),
    st.sampled_from([2, 4, 8, 16, 32, 64, 128, 256]),
    st.sampled_from([16, 20, 100]),
    st.booleans(),
)
@settings(
    max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_round_trip(
    tmp_path: Path,
    family: str,
    scale: ScaleForm,
    codebook: Codebook,
    size: int,
    group: int,
    ste: bool,
) -> None:
    options = {"scale": scale, "codebook": codebook, "lut_size": size, "group_size": group}
    model = quantized(family, ste_fp16=ste, **options)
    loaded, info = load_checkpoint(save(model, tmp_path / "m"))
    assert info == {"stage": "x"}
    assert same(state_of(model), state_of(loaded))
    assert torch.equal(logits_of(model), logits_of(loaded))
    specs = [{n: x.spec for n, x in quantized_layers(m).items()} for m in (model, loaded)]
    assert specs[0] == specs[1]
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("form", list(ScaleForm))
@pytest.mark.parametrize("baked", [False, True])
def test_snapped_and_baked_round_trip(
    tmp_path: Path, family: str, form: ScaleForm, baked: bool
) -> None:
    model = quantized(family, scale=form)
    snap_model(model, baked=baked)
    folder = save(model, tmp_path / "m", half=True)
    loaded, _ = load_checkpoint(folder)
    assert bool(quantized_layers(loaded)) is not baked
    assert same(state_of(model), state_of(loaded))
    assert torch.equal(logits_of(model), logits_of(loaded))
    stored = load_file(folder / "model.safetensors")
    assert {v.dtype for v in stored.values()} <= {torch.float16, torch.uint8}
    assert not any(name == f"{LAYER}.weight" for name in stored) or baked


def test_plain_models_and_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    folder = save(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded, _ = load_checkpoint(folder)
    assert torch.equal(logits_of(model), logits_of(loaded))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    baked = quantized("qwen3")
    bake(baked)
    again, _ = load_checkpoint(save(baked, tmp_path / "b"))
    assert torch.equal(logits_of(baked), logits_of(again))


def test_saving_changes_nothing_and_names_the_content(tmp_path: Path) -> None:
    model = quantized()
    before = state_of(model)
    marks = [
        save_checkpoint(model, tmp_path / n, tokenizer_from=tmp_path, info={"n": n}) for n in "ab"
    ]
    assert same(before, state_of(model))
    assert marks[0] == marks[1] == read_config(tmp_path / "a")["fingerprint"]
    with torch.no_grad():
        quantized_layers(model)[LAYER].scale.a.mul_(1.001)
    save(model, tmp_path / "c")
    assert read_config(tmp_path / "c")["fingerprint"] != marks[0]


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "tokenizer.json").write_text("{}")
    (teacher / "notes.txt").write_text("not a tokenizer")
    save_checkpoint(quantized(), tmp_path / "one", tokenizer_from=teacher, info={})
    save_checkpoint(quantized(), tmp_path / "two", tokenizer_from=tmp_path / "one", info={})
    assert sorted(f.name for f in (tmp_path / "two").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def edit(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda _: None,
    config: Callable[[dict[str, Any]], Any] = lambda _: None,
) -> None:
    """Change a checkpoint and make its digests right again: only the content is wrong."""
    path = folder / "model.safetensors"
    values = {name: value.clone() for name, value in load_file(path).items()}
    tensors(values)
    save_file(values, path)
    body = json.loads((folder / "config.json").read_text())
    config(body)
    body["sha256"] = sha256_file(path)
    body["fingerprint"] = fingerprint({k: body[k] for k in ("sha256", "layers")})
    (folder / "config.json").write_text(json.dumps(body))


WRONG_TENSORS: list[tuple[Callable[[dict[str, Tensor]], Any], type[LutqatError], str]] = [
    (lambda t: t.pop(f"{LAYER}.lut"), CorruptError, rf"{LAYER}\.lut is missing"),
    (lambda t: t.pop(f"{LAYER}.weight"), CorruptError, rf"{LAYER}\.weight is missing"),
    (lambda t: t.pop(f"{LAYER}.bias"), CorruptError, rf"{LAYER}\.bias is missing"),
    (lambda t: t.pop(f"{LAYER}.scale.g"), CorruptError, rf"{LAYER}\.scale\.g is missing"),
    (lambda t: t.pop(f"{LAYER}.indices_packed"), CorruptError, r"indices_packed is missing"),
    (lambda t: t.pop("model.norm.weight"), MismatchError, r"lacks tensor model\.norm\.weight"),
    (
        lambda t: t.update({"model.extra": torch.zeros(2)}),
        MismatchError,
        r"unknown tensor model\.extra",
    ),
    (
        lambda t: t.update({f"{LAYER}.extra": torch.zeros(2)}),
        MismatchError,
        rf"unknown tensor {LAYER}\.extra",
    ),
    (
        lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
        MismatchError,
        r"model\.norm\.weight has shape \[5\], the model's is \[32\]",
    ),
    (
        lambda t: t.update({f"{LAYER}.scale.a": torch.zeros(32, 5)}),
        CorruptError,
        rf"{LAYER}\.scale\.a .*shape \[32, 5\], its layer needs \[32, 4\]",
    ),
    (
        lambda t: t.update({f"{LAYER}.weight": torch.zeros(32, 31)}),
        CorruptError,
        rf"{LAYER}\.weight .*shape \[32, 31\]",
    ),
    (lambda t: t.update({f"{LAYER}.lut": torch.zeros(4)}), CorruptError, r"lut .*shape \[4\]"),
    (
        lambda t: t.update({f"{LAYER}.indices_packed": torch.zeros(9, dtype=torch.uint8)}),
        CorruptError,
        "packed indices hold 9 bytes",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], kind: Any, message: str
) -> None:
    folder = save(quantized("qwen2"), tmp_path / "m")
    edit(folder)
    load_checkpoint(folder)  # the tool itself does no harm
    edit(folder, change)
    with pytest.raises(kind, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_scales_of_other_groups_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(quantized(scale=ScaleForm.GROUP, group_size=20), tmp_path / "m")
    edit(folder, config=lambda c: c["layers"][LAYER].update(group_size=16, rank=9))
    load_checkpoint(folder)  # two groups of 32 inputs either way; a rank of its own it has not
    edit(folder, config=lambda c: c["layers"][LAYER].update(group_size=10))
    with pytest.raises(CorruptError, match=rf"{LAYER}\.scale\.s .*\[32, 2\], .*needs \[32, 4\]"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda c: c["layers"][LAYER].pop("rank"),
            CorruptError,
            f"does not describe layer {LAYER}",
        ),
        (lambda c: c["layers"][LAYER].update(scale="odd"), CorruptError, "odd"),
        (lambda c: c["layers"][LAYER].update(extra=1), CorruptError, "extra"),
        (lambda c: c["layers"][LAYER].update(shape=[4, 4]), MismatchError, r"\[4, 4\]"),
        (
            lambda c: c["layers"].update({"model.layers.9.mlp.up_proj": c["layers"][LAYER]}),
            MismatchError,
            r"no layer model\.layers\.9",
        ),
        (lambda c: c.pop("model"), CorruptError, "config.json is damaged"),
        (lambda c: c.update(format="other"), InputError, "not a lutqat checkpoint"),
    ],
)
def test_wrong_configs_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], kind: Any, message: str
) -> None:
    folder = save(quantized(), tmp_path / "m")
    edit(folder, config=change)
    with pytest.raises(kind, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_damaged_and_truncated_files_are_refused(tmp_path: Path) -> None:
    folder = save(quantized(), tmp_path / "m")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for damaged in (whole[:-100], whole[:5000] + b"?" + whole[5001:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"model\.safetensors has SHA-256 .* says"):
            load_checkpoint(folder)
    weights.write_bytes(whole)
    config.write_text(text.replace('"rank": 4', '"rank": 3', 1))
    with pytest.raises(CorruptError, match="damaged or was edited"):
        load_checkpoint(folder)
    config.write_text(text[:200])
    with pytest.raises(CorruptError, match="not valid JSON"):
        load_checkpoint(folder)
    config.write_text(text)
    load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        load_checkpoint(folder)


def test_an_edited_configuration_is_refused(tmp_path: Path) -> None:
    """Another epsilon would load and compute something else."""
    folder = save(quantized(), tmp_path / "m")
    config = folder / "config.json"
    for old, new in (('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'), ('"info": {', '"inf": {')):
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(CorruptError, match=r"config\.json is damaged or was edited"):
            load_checkpoint(folder)
        config.write_text(text)
    body = json.loads(config.read_text())  # written before the configuration was part of the mark
    body["fingerprint"] = fingerprint({k: body[k] for k in ("sha256", "layers")})
    config.write_text(json.dumps(body))
    load_checkpoint(folder)


def test_unreadable_weights_with_the_right_digest(tmp_path: Path) -> None:
    folder = save(quantized(), tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    body = json.loads((folder / "config.json").read_text())
    body["sha256"] = sha256_file(folder / "model.safetensors")
    body["fingerprint"] = fingerprint({k: body[k] for k in ("sha256", "layers")})
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(CorruptError, match="cannot be read"):
        load_checkpoint(folder)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path / "nothing")
    tiny_model().save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="not a lutqat checkpoint"):
        load_checkpoint(tmp_path / "teacher")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[]")
    with pytest.raises(InputError, match="not a lutqat checkpoint"):
        load_checkpoint(tmp_path / "list")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = save(quantized(), tmp_path / "m")
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}
