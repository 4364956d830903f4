"""The quantized linear layer and the roles of its parameters.

    y = x @ W_q.T + bias,   W_q = LUT[idx] * S,   S = A @ B

Shapes: weight (fp32 master) ``[out, in]``, indices uint8 ``[out, in]``, lut ``[n]``,
A ``[out, r]``, B ``[r, in]``, g ``[r]``, s ``[out, groups]``, E ``[groups, in]``, f ``[1]``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor, nn

from lib.base.errors import MismatchError
from lib.quant.clip import with_best_range
from lib.quant.codebook import assign, cell_edges, make_codebook, safe_ratio
from lib.quant.kernels import is_computable
from lib.quant.refit import fit_codebook, refit
from lib.quant.scales import initial_factors, to_directional, unit_columns, unit_rows
from lib.quant.spec import Codebook, LinearSpec, ScaleForm
from lib.quant.ste import dequantized_weight, lookup, quantized_linear, round_fp16

_INSIDE = 2e-3  # share of the way from a cell's edge to its level


class ParameterRole(StrEnum):
    """What a parameter is, and so whether and how fast a stage trains it."""

    WEIGHT = "weight"
    SCALE_DIRECTION = "scale_direction"
    SCALE_MAGNITUDE = "scale_magnitude"
    LUT = "lut"
    ADAPTER = "adapter"
    FROZEN = "frozen"


class LowRankScale(nn.Module):
    """S = A @ B. The product carries direction and magnitude: both train as directions."""

    form = ScaleForm.LOWRANK
    roles: ClassVar = {"a": ParameterRole.SCALE_DIRECTION, "b": ParameterRole.SCALE_DIRECTION}

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a.contiguous())
        self.b = nn.Parameter(b.contiguous())

    def factors(self, ste_fp16: bool) -> tuple[Tensor, Tensor]:
        """(A ``[out, r]``, B ``[r, in]``), FP16-rounded on request."""
        return (round_fp16(self.a), round_fp16(self.b)) if ste_fp16 else (self.a, self.b)

    def multiply(self, factor: float) -> None:
        """S * factor, in place."""
        self.a.mul_(factor)


class DirectionalScale(nn.Module):
    """S = (A_dir * g) @ B_dir with unit columns and rows, normalized in every forward pass."""

    form = ScaleForm.DIRECTIONAL
    roles: ClassVar = {
        "a": ParameterRole.SCALE_DIRECTION,
        "b": ParameterRole.SCALE_DIRECTION,
        "g": ParameterRole.SCALE_MAGNITUDE,
    }

    def __init__(self, a: Tensor, b: Tensor, g: Tensor, *, normalized: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(a.contiguous())
        self.b = nn.Parameter(b.contiguous())
        self.g = nn.Parameter(g)
        # A snapped layer holds the FP16 directions themselves: normalizing again would move them.
        self.normalized = normalized

    def directions(self, ste_fp16: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(A_dir ``[out, r]``, B_dir ``[r, in]``, g ``[r]``), FP16-rounded on request."""
        a, b = (self.a, self.b) if self.normalized else (unit_columns(self.a), unit_rows(self.b))
        return (round_fp16(a), round_fp16(b), round_fp16(self.g)) if ste_fp16 else (a, b, self.g)

    def factors(self, ste_fp16: bool) -> tuple[Tensor, Tensor]:
        """(A_dir * g ``[out, r]``, B_dir ``[r, in]``)."""
        a, b, g = self.directions(ste_fp16)
        return a * g, b

    def multiply(self, factor: float) -> None:
        """S * factor, in place."""
        self.g.mul_(factor)


class GroupScale(nn.Module):
    """S = s @ E: each scale repeated over its group of inputs (E is :func:`group_members`).

    A scale carries direction and magnitude at once: it trains as a direction, as
    :class:`LowRankScale` does.
    """

    form = ScaleForm.GROUP
    roles: ClassVar = {"s": ParameterRole.SCALE_DIRECTION}
    members: Tensor

    def __init__(self, s: Tensor, members: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(s.contiguous())
        # follows from the sizes: neither stored nor counted
        self.register_buffer("members", members, persistent=False)

    def factors(self, ste_fp16: bool) -> tuple[Tensor, Tensor]:
        """(s ``[out, groups]``, E ``[groups, in]``), s FP16-rounded on request."""
        return (round_fp16(self.s) if ste_fp16 else self.s), self.members

    def multiply(self, factor: float) -> None:
        """S * factor, in place."""
        self.s.mul_(factor)


class ChannelScale(nn.Module):
    """S = f s 1: a scale for every output and one learned clip factor f for the layer.

    s starts as a row's largest |w| over the top level, and f says which share of it the top level
    stands for. Source: "Apple Intelligence Foundation Language Models: Tech Report 2025",
    quantization-aware training at 2 bits. The device holds the product f s.
    """

    form = ScaleForm.CHANNEL
    roles: ClassVar = {"s": ParameterRole.SCALE_DIRECTION, "f": ParameterRole.SCALE_MAGNITUDE}
    ones: Tensor

    def __init__(self, s: Tensor, f: Tensor, in_features: int) -> None:
        super().__init__()
        self.s = nn.Parameter(s.contiguous())
        self.f = nn.Parameter(f.contiguous())
        # follows from the sizes: neither stored nor counted
        self.register_buffer("ones", s.new_ones(1, in_features), persistent=False)

    def factors(self, ste_fp16: bool) -> tuple[Tensor, Tensor]:
        """(f s ``[out, 1]``, 1 ``[1, in]``), the product FP16-rounded on request."""
        product = self.s * self.f
        return (round_fp16(product) if ste_fp16 else product), self.ones

    def multiply(self, factor: float) -> None:
        """S * factor, in place."""
        self.s.mul_(factor)


Scale = LowRankScale | DirectionalScale | GroupScale | ChannelScale


def make_scale(form: ScaleForm, a: Tensor, b: Tensor) -> Scale:
    """S = A @ B in the given form; `group` takes (s, E), `channel` (s, f 1)."""
    match form:
        case ScaleForm.LOWRANK:
            return LowRankScale(a, b)
        case ScaleForm.DIRECTIONAL:
            return DirectionalScale(*to_directional(a, b))
        case ScaleForm.GROUP:
            return GroupScale(a, b)
        case ScaleForm.CHANNEL:
            return ChannelScale(a, b[0, :1].clone(), b.shape[1])


class LutLinear(nn.Module):
    """A linear layer whose weight is LUT indices times scales.

    While the weight trains (``weight.requires_grad``), indices are searched anew in every
    forward pass; otherwise the stored ones hold. A layer without master weight
    (``weight is None``) is snapped: it can only be used.
    """

    weight: nn.Parameter | None
    indices: Tensor

    def __init__(
        self,
        spec: LinearSpec,
        scale: Scale,
        lut: Tensor,
        indices: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.scale = scale
        self.lut = nn.Parameter(lut, requires_grad=False)
        # a foreign LUT can be called uniform and be rounded in another way
        self.affine = spec.codebook.is_affine and is_computable(lut)
        self.register_buffer("indices", indices)
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = indices.shape
        for parameter in scale.parameters():
            parameter.requires_grad_(False)

    @classmethod
    @torch.no_grad()
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: LinearSpec,
        name: str,
        moments: Tensor | None = None,
    ) -> LutLinear:
        """Quantize a weight ``[out, in]``: max-abs scales, codebook, and refits if the spec says
        so; indices are the nearest. Error feedback comes after, for several layers together
        (:func:`lib.model.feedback.feed_back`).

        Args:
            moments: of the inputs, what ``spec.needs`` says: E[x^2] ``[in]``, or E[x x^T]
                ``[in, in]``, which serves for both.

        Raises:
            ParamsError: the rank does not fit the layer, which is named.
        """
        out_features, in_features = weight.shape
        spec.check_shape(out_features, in_features, name)
        weight = weight.detach().float().clone()
        lut = make_codebook(spec.codebook, spec.lut_size).to(weight.device)
        used = torch.ones_like(weight[0])
        if moments is not None:
            moments = moments.to(weight.device)
            used = moments if moments.dim() == 1 else moments.diagonal()
        if spec.search_range:
            if moments is None or moments.dim() != 2:
                raise ValueError(f"{name}: this start needs the second moments of its inputs")
            spec = with_best_range(weight, spec, lut, moments)
        a, b = initial_factors(weight, spec, float(lut.abs().max()))
        if spec.codebook is Codebook.KMEANS:
            lut = fit_codebook(weight, a, b, spec.lut_size, used)
        if spec.refit_steps:
            if moments is None:
                raise ValueError(f"{name}: refitting needs the moments of its inputs")
            a, b = refit(weight, a, b, lut, used, spec)
        indices = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        layer = cls(spec, make_scale(spec.scale, a, b), lut, indices, weight, bias)
        layer.refresh_indices()
        return layer

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"in={self.in_features}, out={self.out_features}, lut={spec.lut_size}, "
            f"rank={spec.rank_of(self.in_features)}, scale={spec.scale.value}"
        )

    @property
    def qweight(self) -> Tensor:
        """The indices, under the name that PEFT looks for in quantized layers: an adapter goes to
        their device."""
        return self.indices

    def roles(self) -> dict[str, ParameterRole]:
        """Role of each parameter, by its name inside the layer."""
        named = {f"scale.{name}": role for name, role in self.scale.roles.items()}
        named["lut"] = ParameterRole.LUT
        if self.weight is not None:
            named["weight"] = ParameterRole.WEIGHT
        if self.bias is not None:
            named["bias"] = ParameterRole.FROZEN
        return named

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A ``[out, r]``, B ``[r, in]``) as the forward pass uses them; S = A @ B."""
        return self.scale.factors(self.spec.ste_fp16)

    def levels(self) -> Tensor:
        """LUT ``[n]`` as the forward pass uses it."""
        return round_fp16(self.lut) if self.spec.ste_fp16 else self.lut

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """W_q ``[out, in]`` float32."""
        a, b = self.factors()
        indices = self.nearest_indices() if self._trains_weight else self.indices
        return dequantized_weight(a, b, self.levels(), indices)

    @property
    def _trains_weight(self) -> bool:
        return self.weight is not None and self.weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        a, b = self.factors()
        return quantized_linear(
            x,
            a,
            b,
            self.levels(),
            indices=self.indices,
            weight=self.weight if self._trains_weight else None,
            bias=self.bias,
            affine=self.affine,
        )

    def master(self) -> nn.Parameter:
        """The master weight ``[out, in]``.

        Raises:
            MismatchError: the layer is snapped and has none.
        """
        if self.weight is None:
            raise MismatchError("a snapped layer has no master weight to quantize again")
        return self.weight

    @torch.no_grad()
    def nearest_indices(self) -> Tensor:
        """Nearest level of each master weight under the present scales, uint8 ``[out, in]``.

        Raises:
            MismatchError: see :meth:`master`.
        """
        a, b = self.factors()
        ratio = safe_ratio(self.master(), a @ b)
        return assign(ratio, self.levels(), affine=self.affine)

    @torch.no_grad()
    def refresh_indices(self) -> None:
        """Store the nearest indices."""
        self.indices.copy_(self.nearest_indices())

    @torch.no_grad()
    def rebase_weight(self, margin: float = 0.0) -> None:
        """Move each master into the cell of its stored index, by the smallest step.

        Scales that trained under frozen indices leave masters in a neighbour's cell; without
        this the first forward pass of weight training would jump to other indices, and lose
        what the scales learned.

        Args:
            margin: share of the way from a cell's edge to its level within which masters are
                moved too, as scales that train along would push them over the edge.
        """
        master = self.master()
        a, b = self.factors()
        scale = a @ b
        lut = self.levels()
        edges = cell_edges(lut, affine=self.affine)
        # A little inside the cell, so that the rounding of w / S stays there too; a share of the
        # way to the level, because the cells of a fitted or learned LUT can be narrow.
        infinity = lut.new_full((1,), float("inf"))
        inside = max(margin, _INSIDE)
        low = lookup(torch.cat([-infinity, edges.lerp(lut[1:], inside)]), self.indices)
        high = lookup(torch.cat([edges.lerp(lut[:-1], inside), infinity]), self.indices)
        before = safe_ratio(master, scale)
        ratio = torch.minimum(torch.maximum(before, low), high)
        moved = ratio != before if margin else self.nearest_indices() != self.indices
        # where S is 0 every weight stands for 0: such a master has no cell to be moved into
        master.copy_(torch.where(moved & (scale != 0), ratio * scale, master))
