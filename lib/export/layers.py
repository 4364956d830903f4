"""The parts of a deployed graph, in the layout of the Neural Engine: (1, channels, 1, tokens).

Shapes: C inputs, O outputs, r ranks, S tokens, H query heads, K key/value heads, D values of a
head, T slots of the cache. Every layer holds FP16-exact constants in float32 tensors, so that it
computes in float32 what the package computes in FP16. No shape is asked of a tensor: the traced
graph would compute it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.model.limits import HEAD_SLICE
from lib.model.linear import LutLinear
from lib.quant.fp16 import round_to_fp16
from lib.quant.ste import lookup


def _constant(values: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(round_to_fp16(values.detach().float()).reshape(shape), requires_grad=False)


class FactoredConv(nn.Module):
    """A quantized layer as one convolution for all its ranks, which stand on the height axis.

        y = sum_k A[:, k] * conv(B[k, :] * x, Q),   Q = LUT[idx]

    ``weight`` holds Q; the converter is told its LUT and stores indices (see
    :mod:`lib.export.coreml`).
    """

    def __init__(self, layer: LutLinear) -> None:
        super().__init__()
        with torch.no_grad():
            a, b = layer.factors()  # [O, r], [r, C]
            self.rows, self.columns = layer.indices.shape
            self.lut = round_to_fp16(layer.levels().detach())
            self.indices = layer.indices
            self.weight = _constant(lookup(self.lut, layer.indices), self.rows, self.columns, 1, 1)
            self.a = _constant(a, 1, self.rows, a.shape[1], 1)
            self.b = _constant(b.T, 1, self.columns, a.shape[1], 1)
            bias = layer.bias
            self.bias = None if bias is None else _constant(bias, 1, self.rows, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, 1, S) -> (1, O, 1, S)."""
        y = (F.conv2d(x * self.b, self.weight) * self.a).sum(2, keepdim=True)
        return y if self.bias is None else y + self.bias


class DenseConv(nn.Module):
    """A layer that is not quantized, or was baked: a convolution with an FP16 weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        self.weight = _constant(layer.weight, rows, columns, 1, 1)
        self.bias = None if layer.bias is None else _constant(layer.bias, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, 1, S) -> (1, O, 1, S)."""
        return F.conv2d(x, self.weight, self.bias)


def convolution(layer: nn.Module) -> FactoredConv | DenseConv:
    """The deployed form of a projection."""
    if isinstance(layer, LutLinear):
        return FactoredConv(layer)
    assert isinstance(layer, nn.Linear)
    return DenseConv(layer)


class ChannelNorm(nn.Module):
    """RMSNorm over axis ``dim``, prescaled by the largest entry so that no square overflows.

    The equation stands in :mod:`lib.ane.norms`.
    """

    def __init__(self, gain: Tensor, eps: float, dim: int) -> None:
        super().__init__()
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        self.gain = _constant(gain, *shape)
        self.root_eps, self.dim = _constant(torch.tensor(eps**0.5), 1, 1, 1, 1), dim

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the gain's size at ``dim``; the same shape."""
        # a tensor, not a number: the converter adds an epsilon of its own to 1 / x
        largest = torch.maximum(x.abs().amax(self.dim, keepdim=True), self.root_eps)
        scaled = x / largest
        floor = self.root_eps / largest
        variance = (scaled * scaled).mean(self.dim, keepdim=True) + floor * floor
        return scaled * torch.rsqrt(variance) * self.gain


class SlicedEmbedding(nn.Module):
    """Rows of a table ``[V, C]``, kept in slices ``[V / n, C, 1, 1]`` that the head shares.

    Tied embeddings are then in the package once: the same constant is looked up here and is the
    weight of a convolution there.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.slices = nn.ParameterList(
            _constant(part, *part.shape, 1, 1) for part in table.split(HEAD_SLICE)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """int32 ``[S]`` -> (1, C, 1, S)."""
        rows = None
        for number, part in enumerate(self.slices):
            first, size = number * HEAD_SLICE, part.shape[0]
            inside = ids - first
            found = part.index_select(0, inside.clamp(0, size - 1))  # [S, C, 1, 1]
            if len(self.slices) > 1:
                here = ((inside >= 0) & (inside < size)).to(found.dtype)
                found = found * here[:, None, None, None]
            rows = found if rows is None else rows + found
        assert rows is not None
        return rows.permute(2, 1, 3, 0)


class Step(NamedTuple):
    """What all blocks share in one call.

    Attributes:
        cosines, sines: of the tokens' positions, (1, 1, D, S).
        mask: added to the scores, (1, 1, H / K * S, T).
        write: 1 where a token goes into a slot, (1, 1, S, T).
        keep: 0 where a slot is written, 1 elsewhere, (1, 1, 1, T).
    """

    cosines: Tensor
    sines: Tensor
    mask: Tensor
    write: Tensor
    keep: Tensor


class Attention(nn.Module):
    """Grouped-query attention over a cache whose slots are chosen by a one-hot matrix.

    Args:
        module: a Transformers attention with q/k/v/o projections, and q/k norms or none.
        norms: (gain, eps) of those norms, by name.
        heads: H and K.
    """

    def __init__(
        self, module: nn.Module, norms: dict[str, tuple[Tensor, float]], heads: tuple[int, int]
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads
        for name in "qkvo":
            self.add_module(name, convolution(module.get_submodule(f"{name}_proj")))
        for name in ("q_norm", "k_norm"):
            self.add_module(name, ChannelNorm(*norms[name], dim=2) if name in norms else None)
        self.head_dim = int(module.head_dim)  # type: ignore[arg-type]
        self.scaling = _constant(torch.tensor(module.scaling), 1, 1, 1, 1)

    def _heads(self, name: str, x: Tensor, count: int) -> Tensor:
        """(1, C, 1, S) -> (1, count, D, S)."""
        return self.get_submodule(name)(x).reshape(1, count, self.head_dim, -1)

    def _rotated(self, name: str, x: Tensor, count: int, step: Step) -> Tensor:
        x = self._heads(name, x, count)
        norm = self._modules[f"{name}_norm"]
        if norm is not None:
            x = norm(x)
        first, second = x.chunk(2, dim=2)
        return x * step.cosines + torch.cat([-second, first], dim=2) * step.sines

    def forward(
        self, x: Tensor, step: Step, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(1, C, 1, S) and keys and values (1, K, D, T) -> (1, C, 1, S) and the new cache."""
        query = self._rotated("q", x, self.heads, step) * self.scaling
        new = (self._rotated("k", x, self.kv_heads, step), self._heads("v", x, self.kv_heads))
        keys, values = (
            old * step.keep + torch.matmul(part, step.write)
            for old, part in zip(cache, new, strict=True)
        )
        # the heads that share keys stand below each other: one product per key head
        query = query.transpose(2, 3).reshape(1, self.kv_heads, -1, self.head_dim)
        scores = torch.matmul(query, keys) + step.mask
        mixed = torch.matmul(scores.softmax(-1), values.transpose(2, 3))  # (1, K, group * S, D)
        mixed = mixed.reshape(1, self.heads, -1, self.head_dim).transpose(2, 3)
        mixed = mixed.reshape(1, self.heads * self.head_dim, 1, -1)
        return self.get_submodule("o")(mixed), (keys, values)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name in ("gate", "up", "down"):
            self.add_module(name, convolution(module.get_submodule(f"{name}_proj")))

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, 1, S) -> (1, C, 1, S)."""
        gate, up = self.get_submodule("gate")(x), self.get_submodule("up")(x)
        return self.get_submodule("down")(F.silu(gate) * up)
