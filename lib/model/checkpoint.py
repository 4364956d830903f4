"""Checkpoint folders: ``model.safetensors``, ``config.json`` and the tokenizer's files.

A training checkpoint holds the fp32 masters, packed indices, LUTs and scale factors of every
quantized layer beside the model's other tensors; a snapped one holds no masters, FP16 LUTs and
scales; a baked one is plain linear layers. All load strictly: a missing, unknown or misshapen
tensor is an error that names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.base.files import atomic_folder, fingerprint, read_json, sha256_file, write_json
from lib.model.linear import (
    ChannelScale,
    DirectionalScale,
    GroupScale,
    LowRankScale,
    LutLinear,
    Scale,
)
from lib.model.surgery import quantized_layers, replace_module
from lib.quant.pack import pack_indices, unpack_indices
from lib.quant.scales import group_members
from lib.quant.spec import LinearSpec, ScaleForm

FORMAT = "lutqat-checkpoint"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
_PACKED = "indices_packed"
_IDENTITY = ("sha256", "layers", "model")
_EARLIER = ("sha256", "layers")  # before the model's configuration was part of it


def _layer_tensors(name: str, layer: LutLinear) -> Iterator[tuple[str, Tensor]]:
    for key, value in layer.named_parameters():
        yield f"{name}.{key}", value.detach()
    yield f"{name}.{_PACKED}", pack_indices(layer.indices, layer.spec.bits)


def _tensors(model: PreTrainedModel, half: bool) -> dict[str, Tensor]:
    layers = quantized_layers(model)
    tensors: dict[str, Tensor] = {}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, value in model.state_dict().items():
        inside = any(name.startswith(f"{layer}.") for layer in _parents(name) if layer in layers)
        if not inside and name not in tied:
            tensors[name] = value.detach()
    for name, layer in layers.items():
        tensors.update(_layer_tensors(name, layer))
    if half:
        tensors = {n: v.half() if v.is_floating_point() else v for n, v in tensors.items()}
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end])


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer_from: Path,
    info: dict[str, Any],
    half: bool = False,
) -> str:
    """Write a checkpoint folder atomically; returns its fingerprint.

    Args:
        info: plain JSON values to keep: stage, result, fingerprints of teacher, data and params.
        tokenizer_from: folder (teacher or checkpoint) whose tokenizer files are copied.
        half: store every tensor as FP16; only for a snapped model, which holds nothing else.
    """
    with atomic_folder(folder) as temporary:
        return write_checkpoint(
            model, temporary, tokenizer_from=tokenizer_from, info=info, half=half
        )


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer_from: Path,
    info: dict[str, Any],
    half: bool = False,
) -> str:
    """The files of :func:`save_checkpoint` in a folder that the caller completes and renames."""
    layers = quantized_layers(model)
    folder.mkdir(exist_ok=True)
    save_file(_tensors(model, half), folder / WEIGHTS)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).exists():
            shutil.copyfile(tokenizer_from / name, folder / name)
    config = {
        "format": FORMAT,
        "info": info,
        "model": json.loads(json.dumps(model.config.to_dict())),  # keys as they will be read
        "layers": {
            name: {
                **layer.spec.to_json(),
                "shape": list(layer.indices.shape),
                "snapped": layer.weight is None,
            }
            for name, layer in layers.items()
        },
        "sha256": sha256_file(folder / WEIGHTS),
    }
    mark = fingerprint({key: config[key] for key in _IDENTITY})
    write_json(folder / CONFIG, {**config, "fingerprint": mark})
    return mark


def _mark(config: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """Fingerprint of a config's entries ``keys``; None where they hold what we never write."""
    try:
        return fingerprint({key: config.get(key) for key in keys})
    except (ValueError, RecursionError):
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        InputError: no such folder, or not a checkpoint of this project.
        CorruptError: the file is damaged or was edited.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no {CONFIG}; give a checkpoint folder (runs/STAGE/model)")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(
            f"{folder} is not a lutqat checkpoint (its {CONFIG} has no format {FORMAT!r}); "
            "import a foreign one with `lutqat convert-checkpoint`"
        )
    marks = {_mark(config, keys) for keys in (_IDENTITY, _EARLIER)} - {None}
    known = isinstance(config.get("model"), dict) and isinstance(config.get("info"), dict)
    if not known or config.get("fingerprint") not in marks:
        raise CorruptError(
            f"{folder / CONFIG} is damaged or was edited; rerun the stage that makes it"
        )
    return config


def _read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CorruptError(f"{path} is missing; rerun the stage that makes {folder}")
    digest = sha256_file(path)
    if digest != config["sha256"]:
        raise CorruptError(
            f"{path} has SHA-256 {digest[:16]}..., its {CONFIG} says {config['sha256'][:16]}...; "
            "the file is damaged or from another run: rerun the stage that makes it"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptError(f"{path} cannot be read ({error}); rerun its stage") from None


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Remove a quantized layer's tensor from ``tensors``; float32, whatever it was stored as.

    Raises:
        CorruptError: it is missing or has another shape.
    """
    value = tensors.pop(name, None)
    if value is None:
        raise CorruptError(f"{name} is missing from {WEIGHTS}; rerun the stage that makes it")
    if tuple(value.shape) != shape:
        raise CorruptError(
            f"{name} in {WEIGHTS} has shape {list(value.shape)}, its layer needs {list(shape)}; "
            "rerun the stage that makes it"
        )
    return value.float()


def _build_layer(
    name: str, plain: nn.Module, entry: dict[str, Any], tensors: dict[str, Tensor]
) -> LutLinear:
    """The quantized layer that stands for ``plain``; takes its tensors out of ``tensors``."""
    try:
        values = dict(entry)
        shape, snapped = tuple(values.pop("shape")), values.pop("snapped")
        spec = LinearSpec.from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{CONFIG} does not describe layer {name} ({error})") from None
    if not isinstance(plain, nn.Linear) or tuple(plain.weight.shape) != shape:
        raise MismatchError(
            f"{CONFIG}: the model has no linear layer {name} of shape {list(shape)}"
        )
    out_features, in_features = shape

    def take(key: str, *wanted: int) -> Tensor:
        return _take(tensors, f"{name}.{key}", wanted)

    def take_scale() -> Scale:
        rank = spec.rank_of(in_features)
        if spec.scale is ScaleForm.GROUP:
            members = group_members(in_features, spec.group_size)
            return GroupScale(take("scale.s", out_features, rank), members)
        if spec.scale is ScaleForm.CHANNEL:
            return ChannelScale(take("scale.s", out_features, 1), take("scale.f", 1), in_features)
        a, b = take("scale.a", out_features, rank), take("scale.b", rank, in_features)
        if spec.scale is ScaleForm.LOWRANK:
            return LowRankScale(a, b)
        return DirectionalScale(a, b, take("scale.g", rank), normalized=snapped)

    scale = take_scale()
    packed = tensors.pop(f"{name}.{_PACKED}", None)
    if packed is None:
        raise CorruptError(f"{name}.{_PACKED} is missing from {WEIGHTS}")
    return LutLinear(
        spec,
        scale,
        take("lut", spec.lut_size),
        unpack_indices(packed, spec.bits, shape),
        None if snapped else take("weight", *shape),
        None if plain.bias is None else take("bias", out_features),
    )


def empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """A Hugging Face model of that configuration whose parameters hold no memory yet."""
    values = dict(config)
    hf_config = AutoConfig.for_model(values.pop("model_type"), **values)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def load_checkpoint(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a checkpoint folder (training, snapped or baked) and its ``info``.

    The model is in eval mode and nothing requires a gradient.

    Raises:
        InputError, CorruptError, MismatchError: as the reason says, naming the tensor.
    """
    config = read_config(folder)
    tensors = _read_tensors(folder, config)
    model = empty_model(config["model"])
    for name, entry in config["layers"].items():
        try:
            plain = model.get_submodule(name)
        except AttributeError:
            raise MismatchError(f"{folder}: the model has no layer {name}") from None
        replace_module(model, name, _build_layer(name, plain, entry, tensors))
    load_plain(model, {name: value.float() for name, value in tensors.items()}, str(folder))
    return model, config["info"]


def load_plain(model: PreTrainedModel, tensors: dict[str, Tensor], where: str) -> None:
    """Give the unquantized parameters their values, strictly, and freeze everything.

    Raises:
        MismatchError: a tensor is unknown, missing or of another shape; the first is named.
    """
    expected = {n: p for n, p in model.named_parameters() if p.is_meta}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    for kind, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise MismatchError(f"{where} {kind} tensor {min(names)} ({len(names)} in all)")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise MismatchError(
                f"{where}: tensor {name} has shape {list(value.shape)}, the model's is "
                f"{list(expected[name].shape)}"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
