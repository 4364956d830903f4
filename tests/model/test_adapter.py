"""LoRA beside quantized layers: gradients, files that PEFT reads, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib.base.errors import CorruptError, InputError, LutqatError, MismatchError, ParamsError
from lib.base.files import write_json
from lib.export.huggingface import save_huggingface
from lib.model.adapter import (
    adapter_layers,
    adapters_off,
    add_adapters,
    change_of,
    check_base,
    load_adapted,
    load_adapter,
    lora_config,
    remove_adapters,
    save_adapter,
)
from lib.model.adapter_files import has_adapter, write_untrained
from lib.model.checkpoint import read_config, save_checkpoint
from lib.model.linear import LutLinear, ParameterRole
from lib.model.load import load_causal_lm
from lib.model.size import model_size
from lib.model.surgery import bake, parameter_roles, projections, quantized_layers
from lib.quant import ste
from lib.snap.snap import snap_model
from tests.export.snapped_models import save_base, snapped
from tests.tiny_models import VOCAB, logits_of, quantized, random_rows, same, state_of, tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 6.0


def fill(model: PreTrainedModel, size: float = 0.1) -> None:
    """Give B, which starts at 0, values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def adapted(family: str = "llama", targets: list[str] = ALL, **changes: Any) -> PreTrainedModel:
    """A snapped tiny model with adapters that do something."""
    model = snapped(family, **changes)
    add_adapters(model, lora_config(RANK, ALPHA, 0.0, targets))
    fill(model)
    return model


def loss_of(run: Callable[[Tensor], Any]) -> Tensor:
    ids = torch.from_numpy(random_rows(4, "train", 3).input_ids).long()
    logits = run(ids).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].flatten())


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradient of every adapter parameter; of nothing else."""
    wanted = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    loss_of(lambda ids: model(input_ids=ids)).backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in wanted)
    found = {}
    for name, parameter in wanted.items():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


def dense_gradients(model: PreTrainedModel, family: str) -> dict[str, Tensor]:
    """The same of a plain model with weights W_q + (alpha / r) B A, by autograd alone."""
    plain = tiny_model(family)
    plain.load_state_dict(
        {
            name.replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if name.replace(".base_layer", "") in dict(plain.named_parameters())
        },
        strict=False,
    )
    leaves, weights = {}, {}
    for name, layer in adapter_layers(model).items():
        base = layer.get_base_layer()
        assert isinstance(base, LutLinear)
        a, b = (
            getattr(layer, f"lora_{x}")["default"].weight.detach().clone().requires_grad_()
            for x in "AB"
        )
        weights[f"{name}.weight"] = base.dequantized() + (ALPHA / RANK) * (b @ a)
        leaves |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
    loss_of(
        lambda ids: functional_call(plain, weights, args=(), kwargs={"input_ids": ids})
    ).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_adapter_gets_the_gradient_of_a_dense_model(family: str) -> None:
    model = adapted(family)
    found, wanted = gradients(model), dense_gradients(model, family)
    assert found.keys() == wanted.keys() and len(found) == 2 * 2 * len(ALL)
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_a_base_without_gradient_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect to rule out: adapters in front of a frozen layer learn nothing through it."""
    plain = ste._QuantizedLinear.apply
    model = adapted()
    wanted = dense_gradients(model, "llama")
    monkeypatch.setattr(ste._QuantizedLinear, "apply", lambda x, *rest: plain(x.detach(), *rest))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    loss_of(lambda ids: model(input_ids=ids)).backward()
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    found = model.get_parameter(name).grad
    assert found is None or (found - wanted[name]).norm() > 0.1 * wanted[name].norm()


def test_untrained_adapters_change_nothing_and_leave_the_generator() -> None:
    model = snapped()
    before, state = logits_of(model), torch.get_rng_state()
    add_adapters(model, lora_config(RANK, ALPHA, 0.0, ALL), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits_of(model), before)
    again = snapped()
    add_adapters(again, lora_config(RANK, ALPHA, 0.0, ALL), seed=3)
    assert same(state_of(model), state_of(again))
    other = snapped()
    add_adapters(other, lora_config(RANK, ALPHA, 0.0, ALL), seed=4)
    assert not same(state_of(model), state_of(other))
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_off_and_taken_off() -> None:
    model = adapted()
    with_it, plain = logits_of(model), logits_of(snapped())
    with adapters_off(model):
        assert torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(model), with_it) and not torch.equal(with_it, plain)
    layers = remove_adapters(model)
    assert torch.equal(logits_of(model), plain)
    assert list(layers) == list(quantized_layers(model))
    name = "model.layers.1.mlp.down_proj"
    a, b = (getattr(layers[name], f"lora_{x}")["default"].weight for x in "AB")
    torch.testing.assert_close(change_of(layers[name]), 1.5 * b @ a)


def test_roles_and_size() -> None:
    model = adapted()
    roles = parameter_roles(model)
    adapters = [name for name, role in roles.items() if role is ParameterRole.ADAPTER]
    assert adapters == [name for name in roles if ".lora_" in name]
    values = sum(model.get_parameter(name).numel() for name in adapters)
    alone, together = model_size(snapped()), model_size(model)
    assert together.bits == alone.bits + 16 * values
    assert together.weights == alone.weights and together.layer_bits == alone.layer_bits


def test_peft_refuses_to_merge_into_a_quantized_layer() -> None:
    layer: Any = next(iter(adapter_layers(adapted()).values()))
    with pytest.raises(MismatchError, match="merge-adapter"):
        layer.merge()


# --- files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher``, ``snap`` (a checkpoint) and ``adapter``, trained on it as it were."""
    folder = tmp_path_factory.mktemp("adapter")
    save_base(folder / "teacher")
    model = snapped()
    save_checkpoint(
        model, folder / "snap", tokenizer_from=folder / "teacher", info={"stage": "snap"}, half=True
    )
    add_adapters(model, lora_config(RANK, ALPHA, 0.1, ALL))
    fill(model)
    save_adapter(model, folder / "adapter", {"base": read_config(folder / "snap")["fingerprint"]})
    return folder


def test_what_was_saved_comes_back(place: Path, tmp_path: Path) -> None:
    assert has_adapter(place / "adapter")
    model = load_adapted(place / "snap", place / "adapter")
    assert not model.training  # so dropout is off
    assert torch.equal(logits_of(model), logits_of(adapted()))
    bake(model)
    torch.testing.assert_close(logits_of(model), logits_of(adapted()), rtol=1e-4, atol=1e-4)
    save_adapter(adapted(targets=ALL[::-1]), tmp_path / "again", {})
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "again" / name).read_bytes() == (place / "adapter" / name).read_bytes()
    config = json.loads((place / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(ALL)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")


# PeftModel asks Transformers by a name of old
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_it_on_the_dense_export(place: Path, tmp_path: Path) -> None:
    save_huggingface(snapped(), place / "teacher", tmp_path / "dense")
    model = PeftModel.from_pretrained(load_causal_lm(tmp_path / "dense"), str(place / "adapter"))
    found = logits_of(model)  # type: ignore[arg-type]
    own = load_causal_lm(tmp_path / "dense")
    plain = logits_of(own)
    assert (found - plain).abs().max() > 0.1  # the adapter does something
    load_adapter(own, place / "adapter")
    assert torch.equal(found, logits_of(own))
    # the quantized model differs by no more than the dense weights' rounding to FP16 explains
    rounding = (plain - logits_of(snapped())).abs().max()
    assert (found - logits_of(adapted())).abs().max() < 4 * rounding


def break_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of an adapter of unknown origin."""

    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        (folder / "recover.json").unlink()

    return damage


def edit_config(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        write_json(path, {**json.loads(path.read_text()), **values})

    return damage


def flip(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def cut(folder: Path) -> None:
    (folder / "recover.json").unlink()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


A_NAME = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], type[LutqatError], str]] = {
    "untrained": (lambda f: (f / "adapter_config.json").unlink(), InputError, "holds no adapter"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        *(CorruptError, "safetensors is missing"),
    ),
    "flipped": (flip, CorruptError, "is damaged .its SHA-256"),
    "cut": (cut, CorruptError, "cannot be read"),
    "lacks": (break_tensors(lambda t: t.pop(A_NAME)), MismatchError, f"lacks.*{A_NAME}"),
    "unknown": (
        break_tensors(lambda t: t.update(x=torch.ones(1))),
        *(MismatchError, "has the unknown tensor x"),
    ),
    "shape": (
        break_tensors(lambda t: t.update({A_NAME: torch.ones(RANK, 3)})),
        *(MismatchError, rf"down_proj.lora_A.weight has shape \[{RANK}, 3\]"),
    ),
    "other kind": (edit_config(peft_type="IA3"), InputError, "describes IA3; only LORA"),
    "DoRA": (edit_config(use_dora=True), InputError, "describes DoRA; only LORA"),
    "no layers": (
        edit_config(target_modules=["c_attn"]),
        *(MismatchError, "the adapter does not fit the model"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line(place: Path, tmp_path: Path, name: str) -> None:
    damage, kind, message = DAMAGES[name]
    folder = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        load_adapted(place / "snap", folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_adapter_says_why(place: Path, tmp_path: Path) -> None:
    write_untrained(tmp_path / "none")
    assert not has_adapter(tmp_path / "none")
    with pytest.raises(InputError, match="holds no adapter .recover.steps is 0."):
        load_adapter(snapped(), tmp_path / "none")
    with pytest.raises(InputError, match="holds no adapter"):
        load_adapter(snapped(), tmp_path / "nowhere")


def test_it_belongs_to_the_checkpoint_it_was_trained_on(place: Path, tmp_path: Path) -> None:
    check_base(place / "adapter", place / "snap")
    other = quantized(lut_size=4)
    snap_model(other, baked=False)
    save_checkpoint(other, tmp_path / "other", tokenizer_from=place / "teacher", info={}, half=True)
    own, found = (
        read_config(folder)["fingerprint"] for folder in (place / "snap", tmp_path / "other")
    )
    with pytest.raises(MismatchError, match=f"checkpoint {own}, .* is {found}"):
        load_adapted(tmp_path / "other", place / "adapter")


def test_a_rank_above_the_layers_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"rank 17 .*k_proj allows; use at most 16"):
        add_adapters(snapped(), lora_config(17, 8.0, 0.0, ["k_proj"]))
    add_adapters(snapped(), lora_config(17, 8.0, 0.0, ["q_proj"]))


def test_plain_layers_get_peft_s_own(place: Path) -> None:
    model = tiny_model()
    load_adapter(model, place / "adapter")
    assert list(adapter_layers(model)) == list(projections(tiny_model()))
