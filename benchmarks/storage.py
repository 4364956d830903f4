"""What a quantized weight takes when it is stored, counted and checked: nothing is taken on trust.

A dense weight that came back from a quantizer is looked at: a group of it must not have more values
than its indices can tell apart, or the bits that are counted are not those of this weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.base.errors import MismatchError

FP16 = 16  # bits of a scale, a zero point that is no integer, and an entry of a lookup table


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Indices, and what groups of weights share besides.

    Attributes:
        bits: of an index.
        rows, columns: outputs and inputs of a weight ``[out, in]`` that are a group; 0 = all.
        shared: bits that a group has besides: scale, zero point, lookup table.
    """

    bits: int
    rows: int = 1
    columns: int = 0
    shared: int

    def group(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Outputs and inputs of a group of a weight of this shape."""
        return self.rows or shape[0], self.columns or shape[1]

    def stored(self, shape: tuple[int, int]) -> int:
        """Bits of a weight ``[out, in]``, a last group that is not full counted as one."""
        rows, columns = self.group(shape)
        groups = -(-shape[0] // rows) * -(-shape[1] // columns)
        return shape[0] * shape[1] * self.bits + groups * self.shared


def integers(bits: int, group_size: int, *, zero_bits: int) -> Storage:
    """Groups of inputs with an FP16 scale, and a zero point of ``zero_bits`` (0: symmetric)."""
    return Storage(bits=bits, columns=group_size, shared=FP16 + zero_bits)


def palette(bits: int, outputs: int) -> Storage:
    """An FP16 lookup table for so many outputs."""
    return Storage(bits=bits, rows=outputs, shared=FP16 * 2**bits)


def most_values(weight: Tensor, storage: Storage) -> int:
    """Different values in the group of ``weight [out, in]`` that has most of them."""
    shape = (weight.shape[0], weight.shape[1])
    rows, columns = storage.group(shape)
    # the last values again fill a group that is not full, and add none
    padding = (0, -shape[1] % columns, 0, -shape[0] % rows)
    full = F.pad(weight[None, None].float(), padding, mode="replicate")[0, 0]
    groups = full.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).permute(0, 2, 1, 3)
    ordered = groups.flatten(2).sort(dim=2).values
    return int(ordered.diff(dim=2).ne(0).sum(dim=2).max()) + 1


def bits_per_weight(weights: dict[str, Tensor], storage: Storage) -> float:
    """Bits of all weights together by their number.

    Raises:
        MismatchError: a weight has a value that is not finite, or more values in a group than it
            has indices for; it is named.
    """
    bits = count = 0
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise MismatchError(f"{name} has a weight that is not finite")
        values = most_values(weight, storage)
        if values > 2**storage.bits:
            raise MismatchError(
                f"{name} has {values} values in a group, {storage.bits} bits are {2**storage.bits}"
            )
        bits += storage.stored((weight.shape[0], weight.shape[1]))
        count += weight.numel()
    return bits / count
