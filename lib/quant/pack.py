"""Dense packing of indices, ``bits`` per index, little end first.

Any LUT size that is a power of two up to 256 has an exact packing of 1 to 8 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lib.base.errors import CorruptError

_GROUP = 8  # indices of b bits fill b bytes, so 8 of them always fit one 64-bit word


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` indices of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Pack uint8 indices of any shape into a flat uint8 tensor of ``packed_bytes`` bytes.

    Raises:
        CorruptError: an index does not fit into ``bits`` bits (nothing is wrapped in silence).
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits {bits} is not in 1..8")
    flat = indices.cpu().numpy().astype(np.int64, copy=False).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= 1 << bits):
        raise CorruptError(
            f"index {flat.max() if flat.max() >= 1 << bits else flat.min()} does not fit into "
            f"{bits} bits (0 to {(1 << bits) - 1}); the LUT and the indices do not belong together"
        )
    values = np.zeros((-(-flat.size // _GROUP), _GROUP), dtype=np.uint64)
    values.reshape(-1)[: flat.size] = flat
    words = np.zeros(len(values), dtype="<u8")
    for place in range(_GROUP):
        words |= values[:, place] << np.uint64(place * bits)
    groups = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return torch.from_numpy(groups.reshape(-1)[: packed_bytes(flat.size, bits)].copy())


def unpack_indices(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_indices`: uint8 tensor of ``shape``.

    Raises:
        CorruptError: the packed tensor has not the length that shape and bits ask for.
    """
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(count, bits):
        raise CorruptError(
            f"packed indices hold {packed.numel()} bytes of {packed.dtype}; shape {list(shape)} at "
            f"{bits} bits needs {packed_bytes(count, bits)} bytes of uint8"
        )
    groups = np.zeros((-(-count // _GROUP), bits), dtype=np.uint8)
    groups.reshape(-1)[: packed.numel()] = packed.cpu().numpy()
    words = np.zeros((len(groups), 8), dtype=np.uint8)
    words[:, :bits] = groups
    wide = words.view("<u8").reshape(-1)
    values = np.empty((len(groups), _GROUP), dtype=np.uint8)
    for place in range(_GROUP):
        values[:, place] = (wide >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return torch.from_numpy(values.reshape(-1)[:count].reshape(shape).copy())
