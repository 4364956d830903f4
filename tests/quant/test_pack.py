"""Packing is exact for every width and count, and never wraps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.base.errors import CorruptError
from lib.quant.pack import pack_indices, packed_bytes, unpack_indices


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 13), st.integers(0, 2**32 - 1))
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    packed = pack_indices(indices, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(rows * columns, bits) == -(-rows * columns * bits // 8)
    again = unpack_indices(packed, bits, (rows, columns))
    assert torch.equal(again, indices) and again.dtype == torch.uint8


def test_little_end_first() -> None:
    assert pack_indices(torch.tensor([1, 2, 3, 0, 3], dtype=torch.uint8), 2).tolist() == [
        0b00_11_10_01,
        0b11,
    ]
    assert pack_indices(torch.tensor([0xA, 0x5], dtype=torch.uint8), 4).tolist() == [0x5A]
    assert pack_indices(torch.tensor([1, 7], dtype=torch.uint8), 3).tolist() == [0b111_001]


@pytest.mark.parametrize("bits", range(1, 8))
def test_out_of_range_is_refused(bits: int) -> None:
    fits = torch.tensor([0, 2**bits - 1], dtype=torch.uint8)
    assert torch.equal(unpack_indices(pack_indices(fits, bits), bits, (2,)), fits)
    with pytest.raises(CorruptError, match=f"index {2**bits} does not fit into {bits} bits"):
        pack_indices(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


@pytest.mark.parametrize("value", [-1, 256, 1000])
def test_values_beyond_a_byte_are_refused(value: int) -> None:
    with pytest.raises(CorruptError, match=f"index {value} does not fit into 8 bits"):
        pack_indices(torch.tensor([0, value]), 8)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1..8"):
        pack_indices(torch.zeros(4, dtype=torch.uint8), bits)


def test_a_wrong_length_or_type_is_refused() -> None:
    packed = pack_indices(torch.zeros(3, 5, dtype=torch.uint8), 2)
    with pytest.raises(CorruptError, match=r"4 bytes .* \[3, 6\] at 2 bits needs 5"):
        unpack_indices(packed, 2, (3, 6))
    with pytest.raises(CorruptError, match="float32"):
        unpack_indices(packed.float(), 2, (3, 5))
