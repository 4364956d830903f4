"""Reading checkpoints of the reference implementation (Anemll qwen3_apple_style_2bit_qat_lora).

Its ``.pt`` files are state dicts of the whole model under Hugging Face names. A quantized layer has

    V1  weight [out, in], scale_A [out, r], scale_B [r, in padded], lut [n]
    V2  weight, scale_A [out, r], scale_B [r, in], rank_magnitude [r], lut,
        _scales_baked_flag, and _indices or _Q [out, in] once its indices are frozen

and both a bias if the layer has one. A ``config.json`` beside the file (or inside it) may say that
weights are snapped. What its forward pass multiplies with, in float32 and without FP16 rounding:

    V1  S = max(A @ B, 1e-8), idx = round((clip(W / S, -1, 1) + 1) / step), W_q = lut[idx] * S
        snapped "lut":   the weight holds lut[idx], W_q = weight * S
        snapped "baked": the weight holds W_q
    V2  S = (A_dir * g) @ B_dir with unit columns and rows, or (A * g) @ B once they are baked;
        Q = lut[_indices], else _Q, else lut[nearest to W / S]; W_q = Q * S

The layers made here give the same W_q within the rounding of float32; where the file stores V1
weights as baked FP16 or BF16, within the rounding of that type.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.base.files import read_json, sha256_file
from lib.base.progress import track
from lib.model.foreign_layer import ForeignLayer, import_layer
from lib.model.load import folder_fingerprint, load_causal_lm, load_pickled
from lib.model.surgery import is_mlp, projections, replace_module

STATE_FILE = "model_state_dict.pt"
CONFIG_FILES = ("config.json", "v2_config.json")
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_STALE = ("rotary_emb.inv_freq",)  # buffers that older versions of Transformers saved


def import_reference(source: Path, base: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a reference checkpoint, its quantized layers as :class:`LutLinear`.

    Args:
        source: the ``.pt`` file, or the folder that holds it as ``model_state_dict.pt``.
        base: Hugging Face folder of the model it was trained from: architecture, and whatever
            tensors the file leaves out.

    Returns:
        the model (eval mode, nothing requires a gradient) and an ``info`` for its checkpoint.

    Raises:
        InputError: no such file, not tensors alone, no quantized layer, or one of a kind that
            has no equal here; names the layer.
        MismatchError: it is not a checkpoint of ``base``: names the layer or tensor.
    """
    file = source / STATE_FILE if source.is_dir() else source
    tensors, config = read_state_dict(file)
    layers, others = _split(tensors, str(file))
    model = load_causal_lm(base)
    _check_layers(model, layers, str(file), base)
    kept = _load_others(model, others, layers, str(file))
    kinds = set()
    for name, layer in track(layers.items(), len(layers), "importing layers"):
        kinds.add("V2" if "rank_magnitude" in layer else "V1")
        replace_module(model, name, import_layer(ForeignLayer(name, layer), config))
    model.requires_grad_(False)
    info = {
        "stage": "import",
        "teacher": folder_fingerprint(base),
        "parent": sha256_file(file)[:16],
        "source": file.name,
        "form": " and ".join(sorted(kinds)),
        "tensors_from_base": kept,
    }
    return model.eval(), info


def read_state_dict(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a ``.pt`` file, unwrapped, and the reference's config (empty: there is none).

    Nothing in the file is executed: it is read with ``weights_only=True``.

    Raises:
        InputError: missing, not a PyTorch file, or holding anything but tensors.
        CorruptError: the config beside it is not JSON.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the .pt file of a reference checkpoint")
    content = load_pickled(file, remedy="save the model's state_dict() and nothing else")
    config: Any = {}
    while isinstance(content, dict) and (inner := next((k for k in _WRAPPERS if k in content), "")):
        config = content.get("config", config)
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{file} holds no state dict but {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{file}: {name} is no tensor but {type(value).__name__}")
    beside = next((file.parent / n for n in CONFIG_FILES if (file.parent / n).is_file()), None)
    if not config and beside is not None:
        config = read_json(beside)
    return dict(content), config if isinstance(config, dict) else {}


def _split(
    tensors: dict[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of each quantized layer, and the model's others."""
    full = [name for name in tensors if name.endswith(".full_scales")]
    if full:
        raise InputError(
            f"{where}: {full[0]} is a scale per weight, without low rank; train with a scale rank"
        )
    layers: dict[str, dict[str, Tensor]] = {
        name.removesuffix(".scale_A"): {} for name in tensors if name.endswith(".scale_A")
    }
    if not layers:
        raise InputError(
            f"{where} has 0 quantized layers (no tensor *.scale_A among its {len(tensors)}, "
            f"{min(tensors)} is one); give a V1 or V2 checkpoint of the reference implementation"
        )
    others = {}
    for name, value in tensors.items():
        layer, _, key = name.rpartition(".")
        if layer in layers:
            layers[layer][key] = value
        elif not name.endswith(_STALE):
            others[name] = value
    return layers, others


def _check_layers(
    model: nn.Module, layers: dict[str, dict[str, Tensor]], where: str, base: Path
) -> None:
    known = projections(model)
    for name, layer in layers.items():
        if name not in known:
            raise MismatchError(
                f"{where}: {name} is quantized, but is no q/k/v/o or gate/up/down projection of "
                f"{base}; give the base model it was trained from"
            )
        weight, wanted = layer.get("weight"), known[name].weight
        assert isinstance(wanted, Tensor)
        if weight is None or weight.shape != wanted.shape:
            found = "missing" if weight is None else list(weight.shape)
            raise MismatchError(
                f"{where}: {name}.weight is {found}, in {base} it is {list(wanted.shape)}; "
                "give the base model it was trained from"
            )
        if ("bias" in layer) != (getattr(known[name], "bias", None) is not None):
            raise MismatchError(f"{where}: {name} has a bias on one side only ({base})")
    attention = any(not is_mlp(name) for name in layers)
    missing = [n for n in known if n not in layers and (is_mlp(n) or attention)]
    if missing:
        raise InputError(
            f"{where} lacks {len(missing)} of the {len(layers) + len(missing)} quantized layers "
            f"({missing[0]} is one); give a complete checkpoint"
        )


@torch.no_grad()
def _load_others(
    model: PreTrainedModel,
    others: dict[str, Tensor],
    layers: dict[str, dict[str, Tensor]],
    where: str,
) -> int:
    """Give the model the tensors outside its quantized layers; returns how many keep ``base``'s."""
    expected = dict(model.named_parameters(remove_duplicate=False))
    expected = {n: p for n, p in expected.items() if n.rpartition(".")[0] not in layers}
    left = set(expected)
    for name, value in others.items():
        if name not in expected or value.shape != expected[name].shape:
            own = list(expected[name].shape) if name in expected else "not there"
            raise MismatchError(
                f"{where}: tensor {name} is {list(value.shape)}, in the base model it is {own}; "
                "give the base model it was trained from"
            )
        tied = [n for n, p in expected.items() if p is expected[name] and n != name]
        if any(n in others and not torch.equal(others[n], value) for n in tied):
            raise MismatchError(f"{where}: {name} and {tied[0]} differ, but the model ties them")
        expected[name].copy_(value.float())
        left -= {name, *tied}
    return len(left)
