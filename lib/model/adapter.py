"""LoRA adapters beside quantized layers: PEFT's layers and files.

    y = x @ W_q.T + bias + (alpha / r) * (dropout(x) @ A.T) @ B.T

Shapes: A ``[r, in]``, B ``[out, r]``, float32; B starts at 0. W_q stays as it is, and gradients
pass through it to the adapters in front. Source: Hu et al., "LoRA" (2021), section 4.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import CorruptError, InputError, MismatchError, ParamsError
from lib.base.files import atomic_folder, read_json, sha256_file, write_json
from lib.model.adapter_files import CONFIG, INFO, WEIGHTS, read_info
from lib.model.checkpoint import load_checkpoint, read_config
from lib.model.folders import is_checkpoint
from lib.model.linear import LutLinear
from lib.model.load import first_line
from lib.model.surgery import adapter_owner, projections, replace_module

_NAME = "default"  # of the one adapter a model has here
_PREFIX = "base_model.model."  # of the names in PEFT's files


class AdaptedLayer(Linear):
    """PEFT's LoRA layer around a :class:`LutLinear`."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, LutLinear)
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: there is no weight to add to.

        Raises:
            MismatchError: always.
        """
        raise MismatchError(
            "a quantized layer has no dense weight to merge an adapter into; use "
            "`lutqat merge-adapter`, or keep the adapter beside it"
        )


def adapter_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every layer with an adapter, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def lora_config(rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> LoraConfig:
    """PEFT's description of plain LoRA.

    Args:
        targets: last parts of the names of the layers that get an adapter.
    """
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets),
    )


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int = 0) -> None:
    """Put an untrained adapter beside every layer that ``config`` names, in place; the model
    computes what it did before. The global generator is left as it was.

    Raises:
        ParamsError: the rank is above what a layer allows.
        MismatchError: the model has no such layers.
    """
    wanted = set(config.target_modules or ())
    for name, layer in projections(model).items():
        assert isinstance(layer, nn.Linear | LutLinear)
        most = min(layer.in_features, layer.out_features)
        if name.rsplit(".", 1)[-1] in wanted and config.r > most:
            raise ParamsError(
                f"an adapter's rank {config.r} is above what {name} allows; use at most {most}"
            )
    config._register_custom_module({LutLinear: AdaptedLayer})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, _NAME)
        except ValueError as error:
            raise MismatchError(
                f"the adapter does not fit the model: {first_line(error)}"
            ) from None
    model.requires_grad_(False)


def remove_adapters(model: PreTrainedModel) -> dict[str, LoraLayer]:
    """Take the adapters off the model again; returns them by the names of their layers."""
    layers = adapter_layers(model)
    for name, layer in layers.items():
        replace_module(model, name, layer.get_base_layer())
    del model.peft_config
    return layers


def change_of(layer: LoraLayer) -> Tensor:
    """What an adapter adds to its layer's weight: (alpha / r) B A ``[out, in]``."""
    assert isinstance(layer, Linear)
    return layer.get_delta_weight(_NAME).detach()


@contextlib.contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """The model without its adapters while the block runs."""
    layers = adapter_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.requires_grad_(False)


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in PEFT's files."""
    return {
        f"{_PREFIX}{name.replace(f'.{_NAME}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if adapter_owner(name) is not None
    }


def save_adapter(model: PreTrainedModel, folder: Path, info: dict[str, Any]) -> None:
    """Write the model's adapters as PEFT does, atomically; equal adapters give equal bytes.

    Args:
        info: plain JSON values to keep: fingerprint of the model they belong to (``base``), result.
    """
    config: Any = model.peft_config[_NAME]
    values = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in _tensors(model).items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, {**values, "inference_mode": True})
        digest = sha256_file(temporary / WEIGHTS)
        write_json(temporary / INFO, {"trained": True, **info, "sha256": digest})


def _read_config(folder: Path) -> LoraConfig:
    values = read_json(folder / CONFIG)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    kind = "DoRA" if kind == "LORA" and values.get("use_dora") else kind
    if kind != "LORA":
        raise InputError(f"{folder / CONFIG} describes {kind or 'no adapter'}; only LORA is known")
    try:
        return LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise CorruptError(f"{folder / CONFIG} is not valid: {first_line(error)}") from None


def _read_tensors(folder: Path, info: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CorruptError(f"{path} is missing; rerun the stage recover")
    if info.get("sha256") not in (None, sha256_file(path)):
        raise CorruptError(f"{path} is damaged (its SHA-256 is not that in {INFO}); rerun recover")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptError(f"{path} cannot be read ({error}); rerun the stage recover") from None


def check_base(folder: Path, checkpoint: Path) -> None:
    """Check that an adapter was trained on this checkpoint, where both say what they are.

    Raises:
        MismatchError: it was trained on another one.
        InputError: see :func:`lib.model.adapter_files.read_info`.
    """
    base = read_info(folder).get("base")
    if base is None or not is_checkpoint(checkpoint):
        return
    found = read_config(checkpoint)["fingerprint"]
    if found != base:
        raise MismatchError(
            f"the adapter in {folder} was trained on the checkpoint {base}, {checkpoint} is "
            f"{found}; give the checkpoint that it was trained on, or rerun the stage recover"
        )


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter of a folder on a model, in place: quantized or plain layers.

    Raises:
        InputError: there is none, or one of another kind.
        CorruptError: a file is missing or damaged.
        MismatchError: its layers are not the model's; the first tensor is named.
    """
    info = read_info(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder, info)
    add_adapters(model, config)
    expected = _tensors(model)
    for kind, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise MismatchError(f"{folder} {kind} tensor {min(names)} ({len(names)} in all)")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise MismatchError(
                f"{folder}: tensor {name} has shape {list(tensors[name].shape)}, the model's is "
                f"{list(parameter.shape)}"
            )
        parameter.copy_(tensors[name])
    model.eval()


def load_adapted(checkpoint: Path, folder: Path) -> PreTrainedModel:
    """A checkpoint's model with the adapter that was trained on it.

    Raises:
        InputError, CorruptError, MismatchError: see :func:`check_base`, :func:`load_adapter` and
            :func:`lib.model.checkpoint.load_checkpoint`.
    """
    check_base(folder, checkpoint)
    model, _ = load_checkpoint(checkpoint)
    load_adapter(model, folder)
    return model
