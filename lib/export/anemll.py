"""Writing checkpoints that the reference implementation (Anemll qwen3_apple_style_2bit_qat_lora)
reads: ``model_state_dict.pt``, its ``config.json`` and, for V1, ``indices.pt``.

Per quantized layer, in float32 unless said otherwise (W_q is ``LUT[idx] * S``):

    V1  weight [out, in] = W_q, scale_A [out, r] = A, scale_B [r, in padded] = B and zeros, lut [n]
    V2  weight [out, in] = W_q, scale_A [out, r] = A_dir * g, scale_B [r, in] = B_dir, lut [n],
        rank_magnitude [r] = 1, _scales_baked_flag int8 = 1, _indices int16 [out, in],
        _Q float16 [out, in] = lut[_indices]

and a bias where the layer has one. Both hold what was snapped, so that no index is searched again.
V1 is ``snapped_mode: baked``: its forward pass takes the weight as it is, and a script that ignores
the mode rounds W_q / S on the even grid to the same indices. V2 carries indices, and scales that
its forward pass does not normalize again; ``A_dir * g`` is exact in float32.

One checkpoint has one version. V1 is written where every layer has low-rank scales and can be said
in V1; otherwise all layers are V2, which also holds for a product ``A @ B`` without directions.
Group scales are such a product, with a rank for each group, and scales per output one of rank 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib.base.errors import InputError
from lib.base.files import atomic_folder, write_json
from lib.export.snapped import plain_tensors, snapped_layers
from lib.model.foreign import STATE_FILE
from lib.model.foreign_layer import MIN_SCALE
from lib.model.linear import DirectionalScale, LutLinear
from lib.model.surgery import is_mlp, projections
from lib.quant.ste import lookup

CONFIG_FILE = "config.json"
INDICES_FILE = "indices.pt"
_REPLACED = re.compile(r"\.mlp\.(gate|up|down)_proj$|\.self_attn\.[qkvo]_proj$")
_EVEN = 2.0**-11  # how far FP16 rounding takes a level from its place on the even grid


@dataclass(frozen=True, kw_only=True)
class _Role:
    """What the reference's config says of all MLP, or all attention, projections.

    Attributes:
        group_size: V1 pads its scales to a multiple of it.
    """

    lut_size: int
    rank: int
    group_size: int

    @property
    def bits(self) -> int:
        return (self.lut_size - 1).bit_length()

    def padding(self, layer: LutLinear) -> int:
        """Columns that V1 adds to ``scale_B``."""
        return -layer.in_features % self.group_size


@torch.no_grad()
def save_anemll(
    model: PreTrainedModel, out: Path, *, model_id: str | None = None
) -> dict[str, Any]:
    """Write a snapped model as an ANEMLL checkpoint folder, atomically.

    Args:
        model_id: Hub name or folder of the model that was quantized; the reference's scripts take
            architecture and tokenizer from there. Without it they go by their ``--model-id`` or
            default.

    Returns:
        ``version`` (v1 or v2), ``layers`` and ``not_v1``: why it is V2, or None.

    Raises:
        InputError: the model is not snapped, is baked, or quantized in a way that the reference's
            config has no words for; names the layer.
        MismatchError: its residual stream was rescaled.
    """
    layers = snapped_layers(model)
    if not layers:
        raise InputError(
            "an ANEMLL checkpoint holds LUTs and indices, and the model has no quantized layer; "
            "give one snapped with snap.form: lut"
        )
    roles = _roles(model, layers)
    found = (_not_v1(name, layer, roles[name]) for name, layer in layers.items())
    obstacle = next((reason for reason in found if reason), None)
    make = _v1_tensors if obstacle is None else _v2_tensors
    state = plain_tensors(model)
    for name, layer in layers.items():
        for key, value in make(layer, roles[name]).items():
            state[f"{name}.{key}"] = value.cpu().contiguous()
    with atomic_folder(out) as temporary:
        torch.save(state, temporary / STATE_FILE)
        if obstacle is None:
            indices = {name: layer.indices.cpu() for name, layer in layers.items()}
            torch.save(indices, temporary / INDICES_FILE)
        version = "v2" if obstacle else "v1"
        write_json(temporary / CONFIG_FILE, _config(version, roles, model_id))
    return {"version": version, "layers": len(layers), "not_v1": obstacle}


def _roles(model: PreTrainedModel, layers: dict[str, LutLinear]) -> dict[str, _Role]:
    """The role of every quantized layer, by the layer's name.

    Raises:
        InputError: MLPs or attention are quantized in part, or with different LUT sizes.
    """
    for name in layers:
        if not _REPLACED.search(name):
            raise InputError(f"{name} has no equal in an ANEMLL checkpoint; export it another way")
    roles: dict[str, _Role] = {}
    for kind in ("MLP", "attention"):
        names = [name for name in projections(model) if is_mlp(name) == (kind == "MLP")]
        there = [name for name in names if name in layers]
        missing = [name for name in names if name not in layers]
        if missing and (there or kind == "MLP"):
            raise InputError(
                f"{missing[0]} is not quantized; an ANEMLL checkpoint has all {kind} projections "
                "quantized" + (", or none" if kind == "attention" else "")
            )
        sizes = {layers[name].spec.lut_size: name for name in there}
        if len(sizes) > 1:
            raise InputError(
                f"{kind} projections have LUTs of {' and '.join(map(str, sorted(sizes)))} entries "
                f"({', '.join(sizes.values())}); an ANEMLL checkpoint has one size for all"
            )
        if there:
            role = _Role(
                lut_size=next(iter(sizes)),
                rank=max(layers[name].factors()[0].shape[1] for name in there),
                group_size=layers[there[0]].spec.group_size,
            )
            roles |= dict.fromkeys(there, role)
    return roles


def _not_v1(name: str, layer: LutLinear, role: _Role) -> str | None:
    """Why V1 cannot say this layer; None where it can."""
    if isinstance(layer.scale, DirectionalScale):
        return f"{name} has directional scales"
    levels = layer.levels()
    even = torch.linspace(-1, 1, levels.numel(), device=levels.device)
    if (levels - even).abs().max() > _EVEN:
        return f"the LUT of {name} is not linspace(-1, 1)"
    largest_rank = min(layer.out_features, layer.in_features + role.padding(layer)) - 1
    if role.rank > largest_rank:
        return f"{name} has rank {role.rank}, above {largest_rank} V1 drops low-rank scales"
    a, b = layer.factors()
    smallest = float((a @ b).min())
    if smallest < MIN_SCALE:
        return f"{name} has a scale of {smallest:.3g}, V1 clamps them at {MIN_SCALE}"
    return None


def _shared_tensors(layer: LutLinear, role: _Role) -> dict[str, Tensor]:
    """Factors padded with zero ranks to the role's rank, as the config has one rank for all."""
    a, b = layer.factors()
    more = role.rank - a.shape[1]
    tensors = {
        "weight": layer.dequantized(),
        "scale_A": F.pad(a, (0, more)),
        "scale_B": F.pad(b, (0, 0, 0, more)),
        "lut": layer.levels().detach().clone(),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    return tensors


def _v1_tensors(layer: LutLinear, role: _Role) -> dict[str, Tensor]:
    tensors = _shared_tensors(layer, role)
    return tensors | {"scale_B": F.pad(tensors["scale_B"], (0, role.padding(layer)))}


def _v2_tensors(layer: LutLinear, role: _Role) -> dict[str, Tensor]:
    return _shared_tensors(layer, role) | {
        "rank_magnitude": torch.ones(role.rank),
        "_scales_baked_flag": torch.tensor(1, dtype=torch.int8),
        "_indices": layer.indices.to(torch.int16),
        "_Q": lookup(layer.levels(), layer.indices).half(),
    }


def _config(version: str, roles: dict[str, _Role], model_id: str | None) -> dict[str, Any]:
    """The reference's config, under all the names by which its scripts ask for a value."""
    mlp = next(role for name, role in roles.items() if is_mlp(name))
    own = next((role for name, role in roles.items() if not is_mlp(name)), None)
    attention = own or mlp
    config: dict[str, Any] = {
        "version": version,
        "lut_size": mlp.lut_size,
        "lut_bits": mlp.bits,
        "mlp_lut_bits": mlp.bits,
        "scale_rank": mlp.rank,
        "mlp_scale_rank": mlp.rank,
        "group_size": mlp.group_size,
        "attn_lut_size": attention.lut_size,
        "attn_lut_bits": attention.bits,
        "attn_scale_rank": attention.rank,
        "attn_group_size": attention.group_size,
        "quantize_attn": own is not None,
    }
    if model_id is not None:
        config["model_id"] = model_id
    if version == "v1":
        return config | {"snapped": True, "snap_bake_scales": True, "snapped_mode": "baked"}
    return config | {
        "force_positive_scales": False,
        "magnitude_activation": "identity",
        "checkpoint": STATE_FILE,
    }
