from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.base.errors import CorruptError, InputError
from lib.text.sequences import SEQUENCES, TokenSet, read_stream, write_stream, write_tokens

ABOUT = {"split": "val", "vocab_size": 288, "pad_id": 0, "tokenizer": "abc"}


def write(folder: Path, rows: int = 3, length: int = 4, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 288, (rows, length), dtype=np.int32)
    write_tokens(folder, ids, np.full(rows, length, np.int32), **ABOUT)
    return ids


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 9), length=st.integers(2, 40), seed=st.integers(0, 99))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: int, length: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 50_000, (rows, length), dtype=np.int32)
    lengths = generator.integers(2, length + 1, rows, dtype=np.int32)
    prompt = generator.random((rows, length)) < 0.5
    write_tokens(folder, ids, lengths, prompt, **ABOUT)
    found = TokenSet(folder)
    assert (found.prompt == prompt).all() and found.prompt.dtype == bool
    assert (found.input_ids == ids).all() and found.input_ids.dtype == np.int32
    assert (found.lengths == lengths).all() and found.lengths.dtype == np.int32
    assert found.input_ids.shape == (rows, length) and len(found) == rows
    assert found.meta["max_length"] == length
    assert found.meta["kind"] == "tokens" and found.meta["split"] == "val"


def test_columns_are_as_documented(tmp_path: Path) -> None:
    write(tmp_path, length=4)
    schema = pa.ipc.open_file(pa.memory_map(str(tmp_path / SEQUENCES))).schema
    assert schema.field("input_ids").type == pa.list_(pa.int32(), 4)
    assert schema.field("length").type == pa.int32()
    assert schema.field("prompt").type == pa.list_(pa.bool_(), 4)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    def mark(seed: int) -> str:
        write(tmp_path, seed=seed)
        return TokenSet(tmp_path).meta["fingerprint"]

    assert mark(0) == mark(0) != mark(1)


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a" / SEQUENCES).read_bytes() == (tmp_path / "b" / SEQUENCES).read_bytes()


def test_stream_round_trip(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.int32)
    write_stream(tmp_path, tokens, vocab_size=1000, tokenizer="abc")
    assert (read_stream(tmp_path) == tokens).all()


@pytest.mark.parametrize("name", ["sequences.arrow", "stream.arrow"])
def test_a_changed_token_is_found(tmp_path: Path, name: str) -> None:
    ids = np.full((1, 4), 0x01020304, np.int32)
    write_tokens(tmp_path, ids, np.array([4], np.int32), **ABOUT)
    write_stream(tmp_path, ids[0], vocab_size=1, tokenizer="abc")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content.replace(b"\4\3\2\1", b"\5\3\2\1", 1))
    with pytest.raises(CorruptError, match="checksum differs"):
        TokenSet(tmp_path) if name == "sequences.arrow" else read_stream(tmp_path)


def test_missing_short_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the tokens stage"):
        TokenSet(tmp_path)
    write(tmp_path)
    path = tmp_path / SEQUENCES
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptError, match="rerun the tokens stage"):
        TokenSet(tmp_path)
    write_stream(tmp_path, np.zeros(3, np.int32), vocab_size=1, tokenizer="abc")
    (tmp_path / "stream.arrow").rename(path)
    with pytest.raises(CorruptError, match="does not hold lutqat tokens"):
        TokenSet(tmp_path)
    write(tmp_path)
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    for name in table.column_names:
        lacking = table.drop_columns([name])
        path.unlink()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, lacking.schema) as writer:
            writer.write_table(lacking)
        with pytest.raises(CorruptError, match="does not hold lutqat tokens"):
            TokenSet(tmp_path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])) as writer:
        writer.write_table(pa.table({}))
    with pytest.raises(CorruptError, match="does not hold lutqat tokens"):
        TokenSet(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"pad_id": 0', b'"pad_id": 1'),
        (b'"max_length"', b'"max_lengtX"'),
        (b'"sha256"', b'"sha25\xff"'),
    ],
)
def test_a_changed_description_is_found(tmp_path: Path, old: bytes, new: bytes) -> None:
    write_tokens(
        tmp_path, np.zeros((2, 4), np.int32), np.full(2, 4, np.int32), **{**ABOUT, "pad_id": 0}
    )
    path = tmp_path / SEQUENCES
    content = path.read_bytes()
    assert content.count(old) == 2  # Arrow has it at both ends
    path.write_bytes(content.replace(old, new))
    with pytest.raises(CorruptError, match=r"sequences\.arrow (is damaged|cannot be read)"):
        TokenSet(tmp_path)
