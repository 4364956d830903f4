"""One quantized layer of the reference implementation as a :class:`LutLinear`.

Shapes: weight ``[out, in]``, A ``[out, r]``, B ``[r, in]``, g ``[r]``, lut ``[n]``. The equations
stand in :mod:`lib.model.foreign`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.base.errors import InputError, MismatchError
from lib.model.linear import DirectionalScale, LowRankScale, LutLinear
from lib.quant.codebook import assign, safe_ratio
from lib.quant.scales import to_directional
from lib.quant.spec import Codebook, LinearSpec
from lib.quant.ste import lookup

MIN_SCALE = 1e-8  # V1 clamps S from below
_ALL_ONES = 1e-5  # magnitudes this close to 1 have been baked into A, where no flag says so
_MAGNITUDE_EPS = 1e-6  # V2 adds it to every magnitude, unless they are baked
_TENSORS = {
    *("weight", "bias", "lut", "scale_A", "scale_B", "rank_magnitude", "_indices", "_Q"),
    *("_scales_baked_flag", "lora_A", "lora_B"),
    *("_cached_weight_q", "_lut_raw_deltas"),  # its own loaders do not use these
}


@dataclass(frozen=True)
class ForeignLayer:
    """The tensors of one layer, by their last name."""

    name: str
    tensors: dict[str, Tensor]

    def get(self, key: str) -> Tensor | None:
        """A tensor in float32, or None."""
        value = self.tensors.get(key)
        return None if value is None else value.detach().float()

    def take(self, key: str, *shape: int) -> Tensor:
        """A tensor in float32.

        Raises:
            InputError: it is missing, has another shape, or is not finite.
        """
        value = self.get(key)
        if value is None or tuple(value.shape) != shape:
            found = "missing" if value is None else list(value.shape)
            raise InputError(f"{self.name}.{key} is {found}, must be {list(shape)}")
        if not value.isfinite().all():
            raise InputError(f"{self.name}.{key} holds NaN or infinity; give an intact checkpoint")
        return value

    def lut(self) -> Tensor:
        """The lookup table ``[n]``, in the order it is stored in."""
        size = self.tensors["lut"].numel() if "lut" in self.tensors else 0
        if size not in {2**bits for bits in range(1, 9)}:
            raise InputError(
                f"{self.name}.lut has {size} entries; only powers of two from 2 to 256 can be read"
            )
        return self.take("lut", size)


@torch.no_grad()
def import_layer(layer: ForeignLayer, config: dict[str, Any]) -> LutLinear:
    """The layer as the reference's forward pass uses it; the file's weight becomes its master.

    Args:
        config: the reference's ``config.json``.

    Raises:
        InputError: tensors are missing, misshapen or of a kind that has no equal here.
        MismatchError: weights are not what the config says of them.
    """
    _check_kind(layer)
    weight = layer.take("weight", *layer.tensors["weight"].shape)
    lut = layer.lut()
    read = _read_v2 if "rank_magnitude" in layer.tensors else _read_v1
    scale, lut, indices, master = read(layer, weight, lut, config)
    order = lut.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(lut.numel()))
    lut, indices = lut[order], lookup(place.float(), indices).to(torch.uint8)
    spec = LinearSpec(
        lut_size=lut.numel(),
        rank=scale.a.shape[1],
        group_size=int(config.get("group_size") or 32),
        scale=scale.form,
        codebook=_codebook(lut),
        ste_fp16=False,  # the file's numbers are used as they are
    )
    bias = layer.take("bias", len(weight)) if "bias" in layer.tensors else None
    return LutLinear(spec, scale, lut, indices, master, bias)


def _check_kind(layer: ForeignLayer) -> None:
    unknown = sorted(layer.tensors.keys() - _TENSORS)
    if unknown:
        raise InputError(
            f"{layer.name}.{unknown[0]} is not known: neither a V1 nor a V2 layer has it"
            + (" without quantized ranks" if unknown[0] in ("A_lut", "B_lut", "_A_idx") else "")
        )
    adapter = layer.get("lora_B")
    if adapter is not None and adapter.any():
        raise InputError(
            f"{layer.name} has a recovery adapter (lora_A, lora_B), which would be lost; "
            "give the checkpoint from before the recovery"
        )


def _codebook(lut: Tensor) -> Codebook:
    """``uniform`` for linspace(-1, 1) up to FP16 rounding; any other is fixed like ``kmeans``."""
    even = torch.linspace(-1, 1, lut.numel())
    return Codebook.UNIFORM if (lut - even).abs().max() <= 2**-11 else Codebook.KMEANS


# scale, LUT, indices, master weight
_Read = tuple[LowRankScale | DirectionalScale, Tensor, Tensor, Tensor]


def _read_v1(layer: ForeignLayer, weight: Tensor, lut: Tensor, config: dict[str, Any]) -> _Read:
    rows, columns = weight.shape
    rank, padded = layer.tensors["scale_A"].shape[-1], layer.tensors["scale_B"].shape[-1]
    a, b = layer.take("scale_A", rows, rank), layer.take("scale_B", rank, padded)
    if padded < columns:
        raise InputError(f"{layer.name}.scale_B has {padded} columns, the layer {columns} inputs")
    b = b[:, :columns].contiguous()
    scale = (a @ b).clamp_min(MIN_SCALE)
    a, b = clamp_factors(a, b, layer.name)
    mode = _snapped_mode(config) or ("lut" if _holds_levels(weight, lut, layer) else None)
    if mode == "lut":
        if not _holds_levels(weight, lut, layer):
            raise MismatchError(_not_snapped(layer, "values of its LUT"))
        indices, weight = _nearest(weight, lut), weight * scale
    elif mode == "baked":
        indices = _nearest(safe_ratio(weight, scale), lut)
        lost = (weight - lookup(lut, indices) * scale).abs()
        if (lost > _rounding(layer) * (a.abs() @ b.abs())).any():
            raise MismatchError(_not_snapped(layer, "LUT values times scales"))
    else:
        indices = reference_indices(safe_ratio(weight, scale), lut)
    return LowRankScale(a, b), lut, indices, weight


def _snapped_mode(config: dict[str, Any]) -> str | None:
    mode = config.get("snapped_mode")
    if mode is None and config.get("snapped"):  # as older files say it
        mode = "baked" if config.get("snap_bake_scales") else "lut"
    return mode


def _not_snapped(layer: ForeignLayer, what: str) -> str:
    return (
        f"{layer.name}: its config.json says that the weights are {what}, but they are not; "
        "give the config that belongs to the file"
    )


def _rounding(layer: ForeignLayer) -> float:
    """A few roundings of the type that the weight is stored in, relative."""
    return 4 * torch.finfo(layer.tensors["weight"].dtype).eps


def _holds_levels(weight: Tensor, lut: Tensor, layer: ForeignLayer) -> bool:
    """Whether every weight is an entry of the LUT (as trained weights never are)."""
    near = lookup(lut, _nearest(weight, lut))
    return bool(((weight - near).abs() <= _rounding(layer) * near.abs()).all())


def _nearest(values: Tensor, lut: Tensor) -> Tensor:
    """Index of the nearest entry of a LUT in any order; ties go to the lower level."""
    order = lut.argsort(stable=True)
    return lookup(order.float(), assign(values.clone(), lut[order], affine=False)).to(torch.uint8)


def reference_indices(ratio: Tensor, lut: Tensor) -> Tensor:
    """V1's index of each W / S ``[out, in]``: by rounding on the grid that its LUT was *made* with
    (evenly spaced, or one with a zero), whatever became of the levels in training."""
    size = lut.numel()
    x = ratio.nan_to_num(nan=0.0).clamp(-1, 1)
    if (lut == 0).any():
        below, above = size // 2, max(1, size // 2 - 1)
        steps = torch.where(x < 0, (x + 1) / (1 / below), x / (1 / above) + below)
    else:
        steps = (x + 1) / (2 / (size - 1))
    return steps.round().clamp(0, size - 1).to(torch.uint8)


def clamp_factors(a: Tensor, b: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Factors of max(A @ B, 1e-8): one rank more for each row (or column) that the clamp touches.

    The truncated SVD of a group-maxima matrix dips below zero for some group of some row now and
    then; nothing else of low rank would give these weights the (nearly zero) values they have.

    Raises:
        InputError: so many rows and columns are touched that S has no rank to spare.
    """
    lifted = (MIN_SCALE - a @ b).clamp_min(0)  # [out, in]
    rows, columns = lifted.any(dim=1).nonzero()[:, 0], lifted.any(dim=0).nonzero()[:, 0]
    extra = min(len(rows), len(columns))
    if a.shape[1] + extra > min(a.shape[0], b.shape[1]):
        raise InputError(
            f"{name} has scales below {MIN_SCALE} in {len(rows)} rows and {len(columns)} columns, "
            "which is no low-rank matrix once clamped; train it further before importing"
        )
    if len(rows) <= len(columns):
        more_a, more_b = F.one_hot(rows, len(a)).T.float(), lifted[rows]
    else:
        more_a, more_b = lifted[:, columns], F.one_hot(columns, b.shape[1]).float()
    return torch.cat([a, more_a], dim=1), torch.cat([b, more_b], dim=0)


def _read_v2(layer: ForeignLayer, weight: Tensor, lut: Tensor, config: dict[str, Any]) -> _Read:
    rows, columns = weight.shape
    rank = layer.tensors["scale_A"].shape[-1]
    a, b = layer.take("scale_A", rows, rank), layer.take("scale_B", rank, columns)
    g = layer.take("rank_magnitude", rank)
    flag = layer.get("_scales_baked_flag")
    if bool(flag) if flag is not None else bool((g - 1).abs().max() <= _ALL_ONES):
        scale = DirectionalScale(*to_directional(a * g, b))
    else:
        scale = DirectionalScale(*_constrained(a, b, g, config))
    stored, frozen = layer.get("_indices"), layer.get("_Q")
    if stored is not None:
        indices = layer.take("_indices", rows, columns)
        if indices.min() < 0 or indices.max() >= lut.numel():
            raise InputError(f"{layer.name}._indices go beyond its LUT of {lut.numel()} entries")
    elif frozen is not None:
        frozen = layer.take("_Q", rows, columns)
        indices = _nearest(frozen, lut)
        lut = next(
            (
                levels
                for levels in (lut, lut.half().float(), lut.bfloat16().float())
                if torch.equal(lookup(levels, indices), frozen)
            ),
            lut,
        )
        if not torch.equal(lookup(lut, indices), frozen):
            raise MismatchError(f"{layer.name}._Q has values that are not in its lut")
    else:
        factors = scale.factors(ste_fp16=False)
        indices = _nearest(safe_ratio(weight, factors[0] @ factors[1]), lut)
    return scale, lut, indices.to(torch.uint8), weight


def _constrained(
    a: Tensor, b: Tensor, g: Tensor, config: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """V2's optional constraints, worked into the numbers; off unless the config says so."""
    if config.get("force_positive_scales"):
        positive = F.softplus if config.get("positive_scale_method") == "softplus" else torch.abs
        a, b = positive(a), positive(b)
    activation = config.get("magnitude_activation", "identity")
    known = {"identity": lambda x: x, "abs": torch.abs, "softplus": F.softplus}
    if activation not in known:
        raise InputError(f"magnitude_activation {activation!r} is not one of {', '.join(known)}")
    return a, b, known[activation](g) + float(config.get("magnitude_eps", _MAGNITUDE_EPS))
