from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib.text.pack import SHORTEST_ROW, Packer

PAD = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=12)
LENGTHS = st.integers(2, 12)
LIMITS = st.none() | st.integers(0, 8)


def pack(
    documents: list[list[int]], length: int, packing: bool, limit: int | None, batch: int = 3
) -> list[list[int]]:
    """Real tokens of each row, after checking shape and padding."""
    packer = Packer(length, PAD, packing=packing, limit=limit)
    for start in range(0, len(documents), batch):
        packer.add(documents[start : start + batch])
    input_ids, lengths = packer.rows()
    assert input_ids.shape == (len(lengths), length)
    assert input_ids.dtype == lengths.dtype == np.int32
    for row, real in zip(input_ids, lengths, strict=True):
        assert SHORTEST_ROW <= real <= length
        assert (row[real:] == PAD).all()
    return [row[:real].tolist() for row, real in zip(input_ids, lengths, strict=True)]


@given(DOCUMENTS, LENGTHS)
def test_packing_neither_loses_nor_repeats_tokens(documents: list[list[int]], length: int) -> None:
    rows = pack(documents, length, packing=True, limit=None)
    stream = [token for document in documents for token in document]
    packed = [token for row in rows for token in row]
    assert stream[: len(packed)] == packed
    assert len(stream) - len(packed) < SHORTEST_ROW
    assert all(len(row) == length for row in rows[:-1])


@given(DOCUMENTS, LENGTHS)
def test_without_packing_a_row_is_the_start_of_a_document(
    documents: list[list[int]], length: int
) -> None:
    rows = pack(documents, length, packing=False, limit=None)
    assert rows == [d[:length] for d in documents if len(d) >= SHORTEST_ROW]


@given(DOCUMENTS, LENGTHS, st.booleans(), LIMITS)
def test_a_limit_keeps_the_first_rows(
    documents: list[list[int]], length: int, packing: bool, limit: int | None
) -> None:
    everything = pack(documents, length, packing, limit=None)
    assert pack(documents, length, packing, limit) == everything[:limit]


@given(DOCUMENTS, LENGTHS, st.booleans(), LIMITS, st.integers(1, 5))
def test_batches_do_not_matter(
    documents: list[list[int]], length: int, packing: bool, limit: int | None, batch: int
) -> None:
    whole = pack(documents, length, packing, limit, batch=100)
    assert pack(documents, length, packing, limit, batch) == whole


def test_full_is_said_as_soon_as_it_is_so() -> None:
    packer = Packer(4, PAD, packing=True, limit=2)
    packer.add([[1, 2, 3, 4, 5, 6, 7]])
    assert not packer.full
    packer.add([[8]])
    assert packer.full
    assert Packer(4, PAD, packing=True, limit=0).full
