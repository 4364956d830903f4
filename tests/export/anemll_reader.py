"""The reference's reading of its checkpoints, written from its published equations: entry by entry,
in Python's double precision, without anything of ``lib``.

One function says what its layer constructors allocate for a ``config.json`` (a checkpoint of other
names or shapes does not load there); the others give the weight that its forward passes use.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def read_folder(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """State dict and config."""
    state = torch.load(folder / "model_state_dict.pt", weights_only=True)
    return state, json.loads((folder / "config.json").read_text())


def layer_of(state: Tensors, name: str) -> Tensors:
    """The tensors of one layer by their last names."""
    return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}


def allocated(config: dict[str, Any], plain: Shapes) -> Shapes:
    """Names and shapes that the reference's model has, from those of the unquantized model.

    ``_Q`` and ``_indices`` start as None there and take any tensor of the weight's shape.
    """
    shapes: Shapes = {}
    for name, shape in plain.items():
        layer, _, key = name.rpartition(".")
        role = layer.rpartition(".")[2]
        attention = role in ATTENTION and config["quantize_attn"]
        if key != "weight" or not (role in MLP or attention):
            shapes[name] = shape
            continue
        prefix = "attn_" if attention else ""
        rank, group = config[f"{prefix}scale_rank"], config[f"{prefix}group_size"]
        out_features, columns = shape
        shapes[name] = shape
        shapes[f"{layer}.lut"] = (2 ** config[f"{prefix}lut_bits"],)
        assert config[f"{prefix}lut_size"] == 2 ** config[f"{prefix}lut_bits"]
        if config["version"] == "v1":
            columns += -columns % group
            assert rank < min(out_features, columns)  # else it has full_scales instead
        else:
            shapes[f"{layer}.rank_magnitude"] = (rank,)
            shapes[f"{layer}._scales_baked_flag"] = ()
            shapes[f"{layer}._indices"] = shapes[f"{layer}._Q"] = shape
        shapes[f"{layer}.scale_A"] = (out_features, rank)
        shapes[f"{layer}.scale_B"] = (rank, columns)
    return shapes


def _product(a: list[list[float]], b: list[list[float]], i: int, j: int) -> float:
    return math.fsum(a[i][k] * b[k][j] for k in range(len(b)))


def v1_indices(t: Tensors) -> list[list[int]]:
    """Its rounding of W / S on the even grid, for weights that are not said to be snapped."""
    weight, a, b = (t[key].tolist() for key in ("weight", "scale_A", "scale_B"))
    size = t["lut"].numel()
    step = 2.0 / (size - 1)
    result = []
    for i, row in enumerate(weight):
        ratios = [value / max(_product(a, b, i, j), 1e-8) for j, value in enumerate(row)]
        places = [round((min(max(x, -1.0), 1.0) + 1.0) / step) for x in ratios]
        result.append([min(max(place, 0), size - 1) for place in places])
    return result


def v1_weight(t: Tensors, snapped_mode: str | None) -> Tensor:
    """W_q ``[out, in]``, float64: as snapped_mode says, or quantized again where there is none."""
    weight, a, b, lut = (t[key].tolist() for key in ("weight", "scale_A", "scale_B", "lut"))
    if snapped_mode == "baked":
        return t["weight"].double()
    if snapped_mode is None:
        weight = [[lut[index] for index in row] for row in v1_indices(t)]
    scaled = [
        [value * max(_product(a, b, i, j), 1e-8) for j, value in enumerate(row)]
        for i, row in enumerate(weight)
    ]
    return torch.tensor(scaled, dtype=torch.float64)


def _v2_factors(t: Tensors, baked: bool) -> tuple[list[list[float]], list[list[float]]]:
    """A_dir * g and B_dir; as they are stored once they are baked."""
    a, b, g = (t[key].tolist() for key in ("scale_A", "scale_B", "rank_magnitude"))
    if not baked:
        for k in range(len(g)):
            norm = max(math.sqrt(math.fsum(row[k] ** 2 for row in a)), 1e-6)
            for row in a:
                row[k] /= norm
            norm = max(math.sqrt(math.fsum(value**2 for value in b[k])), 1e-6)
            b[k] = [value / norm for value in b[k]]
            g[k] += 1e-6
    return [[value * g[k] for k, value in enumerate(row)] for row in a], b


def v2_weight(t: Tensors, *, by: str = "flag", levels: str = "_indices") -> Tensor:
    """W_q ``[out, in]``, float64.

    Args:
        by: how a script knows that scales are baked: ``flag``, or ``ones`` (all magnitudes are 1).
        levels: the buffer that the script takes: ``_indices`` or ``_Q``.
    """
    flag = bool(t["_scales_baked_flag"].item())
    baked = flag if by == "flag" else all(abs(g - 1) <= 1e-5 for g in t["rank_magnitude"].tolist())
    a, b = _v2_factors(t, baked)
    lut = t["lut"].tolist()
    q = t[levels].tolist()
    if levels == "_indices":
        q = [[lut[index] for index in row] for row in q]
    rows = [[q_ij * _product(a, b, i, j) for j, q_ij in enumerate(row)] for i, row in enumerate(q)]
    return torch.tensor(rows, dtype=torch.float64)
