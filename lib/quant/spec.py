"""What a quantized layer is made of: codebook, scale form, sizes. Pure descriptions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from lib.base.errors import ParamsError


class Codebook(StrEnum):
    """How the LUT values come about (docs/math.md, "Codebooks")."""

    UNIFORM = "uniform"
    BALANCED = "balanced"
    KMEANS = "kmeans"
    LEARNED = "learned"

    @property
    def is_affine(self) -> bool:
        """Whether the levels are equally spaced, so that the nearest one is found by rounding."""
        return self in (Codebook.UNIFORM, Codebook.BALANCED)


class ScaleForm(StrEnum):
    """How S [out, in] is parametrized."""

    LOWRANK = "lowrank"
    DIRECTIONAL = "directional"
    GROUP = "group"
    CHANNEL = "channel"

    @property
    def has_ranks(self) -> bool:
        """Whether the rank is a choice; that of scales per group or per output follows."""
        return self in (ScaleForm.LOWRANK, ScaleForm.DIRECTIONAL)


class Moments(StrEnum):
    """What is to be known of a layer's inputs x."""

    NONE = "none"
    SQUARES = "squares"
    """E[x^2] of each."""
    PRODUCTS = "products"
    """E[x x^T]."""


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One quantized linear layer, ``W_q = LUT[idx] * S``.

    Attributes:
        lut_size: number of LUT entries, a power of two from 2 to 256.
        rank: rank r of S; `group` and `channel` have none of their own (:meth:`rank_of`).
        group_size: inputs per group: of `group` scales for good, of those with ranks at
            initialization (refined where the rank needs more groups); `channel` has no groups.
        scale: parametrization of S.
        codebook: where the LUT values come from.
        range: share of a group's (or an output's) max|w| that the outermost level stands for.
        search_range: `range` is not taken as given, but found (:mod:`lib.quant.clip`).
        ste_fp16: LUT and scales are rounded to FP16 in the forward pass.
        refit_steps: importance-weighted refits of indices and factors after the max-abs start
            (:mod:`lib.quant.refit`); 0 = none.
        feedback: indices are found by error feedback (:mod:`lib.quant.gptq`) instead of one by one.
        descent_steps: rounds of coordinate descent over the indices after the feedback; 0 = none.
    """

    lut_size: int
    rank: int
    group_size: int
    scale: ScaleForm
    codebook: Codebook
    range: float = 1.0
    search_range: bool = False
    ste_fp16: bool = True
    refit_steps: int = 0
    feedback: bool = False
    descent_steps: int = 0

    @property
    def needs(self) -> Moments:
        """What of the layer's inputs it takes to quantize a weight."""
        if self.feedback or self.search_range:
            return Moments.PRODUCTS
        return Moments.SQUARES if self.refit_steps else Moments.NONE

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return (self.lut_size - 1).bit_length()

    def rank_of(self, in_features: int) -> int:
        """Rank of S of a layer with so many inputs: of `group` scales the number of groups, of
        `channel` scales 1."""
        match self.scale:
            case ScaleForm.GROUP:
                return -(-in_features // self.group_size)
            case ScaleForm.CHANNEL:
                return 1
            case _:
                return self.rank

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's config."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LinearSpec:
        """Inverse of :meth:`to_json`."""
        return cls(
            **{
                **values,
                "scale": ScaleForm(values["scale"]),
                "codebook": Codebook(values["codebook"]),
            }
        )

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        """Refuse a rank that the layer cannot have; any number of groups will do.

        Raises:
            ParamsError: rank above min(out, in); the layer is named.
        """
        if self.scale.has_ranks and self.rank > min(out_features, in_features):
            raise ParamsError(
                f"rank {self.rank} is above what {name} [{out_features}, {in_features}] allows; "
                f"use at most {min(out_features, in_features)}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which layers of a model are quantized and how. ``attention=None`` leaves attention as is."""

    mlp: LinearSpec
    attention: LinearSpec | None
    seed: int = 0

    @property
    def needs(self) -> Moments:
        """The most that one of the layers needs."""
        needed = {spec.needs for spec in (self.mlp, self.attention) if spec is not None}
        return max(needed, key=list(Moments).index)
