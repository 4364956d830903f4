from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib.text.pack import SHORTEST_ROW, Encoded, Packer, Rows

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
        packer.add([Encoded(tokens) for tokens in documents[start : start + batch]])
    rows = packer.rows()
    assert not rows.prompt.any()
    input_ids, lengths = rows.input_ids, rows.lengths
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
    packer.add([Encoded([1, 2, 3, 4, 5, 6, 7])])
    assert not packer.full
    packer.add([Encoded([8])])
    assert packer.full
    assert Packer(4, PAD, packing=True, limit=0).full


@given(DOCUMENTS, LENGTHS, st.booleans(), st.data())
def test_prompts_are_marked_where_their_tokens_come_to_lie(
    documents: list[list[int]], length: int, packing: bool, data: st.DataObject
) -> None:
    """Prompt tokens are made negative, so that a token itself says what it is."""
    packer = Packer(length, PAD, packing=packing, limit=None)
    for tokens in documents:
        prompt = data.draw(st.integers(0, len(tokens)))
        signed = [-t if i < prompt else t for i, t in enumerate(tokens)]
        packer.add([Encoded(signed, prompt)])
    rows = packer.rows()
    assert rows.prompt.shape == rows.input_ids.shape
    assert (rows.prompt == (rows.input_ids < 0)).all()


def test_rows_are_joined_and_chosen() -> None:
    packer = Packer(3, PAD, packing=False, limit=None)
    packer.add([Encoded([1, 2], 1), Encoded([3, 4, 5], 2)])
    rows = packer.rows()
    both = Rows.join([rows, rows[1:]])[np.array([2, 0])]
    assert both.input_ids.tolist() == [[3, 4, 5], [1, 2, PAD]]
    assert both.lengths.tolist() == [3, 2] and len(both) == 2
    assert both.prompt.tolist() == [[True, True, False], [True, False, False]]
