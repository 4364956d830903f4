"""Token rows on disk: Arrow IPC files that are read by memory mapping.

``SPLIT/sequences.arrow``: input_ids FixedSizeList<int32>[L] (padded on the right), length int32,
prompt FixedSizeList<bool>[L].
``test/stream.arrow``: one column ``token`` int32, a continuous text for perplexity.
Both carry a JSON description in their schema metadata under ``lutqat``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lib.base.errors import CorruptError, InputError, trouble_of
from lib.base.files import atomic_file, fingerprint

SEQUENCES = "sequences.arrow"
STREAM = "stream.arrow"
_KEY = b"lutqat"
_ROWS = {"input_ids": pa.int32(), "length": pa.int32(), "prompt": pa.bool_()}
_PER_TOKEN = ("input_ids", "prompt")  # lists of max_length


class TokenSet:
    """One split of the token rows.

    Attributes:
        input_ids: int32 [N, L], memory-mapped, padded on the right.
        lengths: int32 [N], real tokens of each row, 2 to L.
        prompt: bool [N, L], the token belongs to a prompt, not to the answer that follows.
        meta: kind, split, vocab_size, max_length, pad_id, tokenizer and content fingerprints.
    """

    def __init__(self, folder: Path) -> None:
        """Open ``folder/sequences.arrow``.

        Raises:
            InputError: the file does not exist.
            CorruptError: it is damaged or something else.
        """
        table, self.meta = _read(folder / SEQUENCES, "tokens", _ROWS)
        self.lengths: NDArray[np.int32] = table.column("length").to_numpy()
        ids = table.column("input_ids").combine_chunks()
        flat = ids.flatten().to_numpy(zero_copy_only=False)
        self.input_ids: NDArray[np.int32] = flat.reshape(len(ids), self.meta["max_length"])
        asked = table.column("prompt").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        self.prompt: NDArray[np.bool_] = asked.reshape(self.input_ids.shape)
        content = [self.input_ids, self.lengths, self.prompt]
        _check_content(folder / SEQUENCES, self.meta, content)

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, count: int) -> TokenSet:
        """The first ``count`` rows (all, if there are fewer)."""
        part = copy.copy(self)
        part.input_ids, part.lengths = self.input_ids[:count], self.lengths[:count]
        part.prompt = self.prompt[:count]
        return part


def write_tokens(
    folder: Path,
    input_ids: NDArray[np.int32],
    lengths: NDArray[np.int32],
    prompt: NDArray[np.bool_] | None = None,
    *,
    split: str,
    vocab_size: int,
    pad_id: int,
    tokenizer: str,
) -> None:
    """Write one split; ``input_ids`` and ``prompt`` (None: no prompts) are [N, L], ``lengths`` is
    [N], ``tokenizer`` a fingerprint."""
    max_length = input_ids.shape[1]
    asked = np.zeros(input_ids.shape, dtype=bool) if prompt is None else prompt
    meta = {
        "kind": "tokens",
        "split": split,
        "vocab_size": vocab_size,
        "max_length": max_length,
        "pad_id": pad_id,
        "tokenizer": tokenizer,
    }
    flat = pa.array(np.ascontiguousarray(input_ids, dtype=np.int32).reshape(-1))
    columns = {
        "input_ids": pa.FixedSizeListArray.from_arrays(flat, max_length),
        "length": pa.array(lengths.astype(np.int32)),
        "prompt": pa.FixedSizeListArray.from_arrays(pa.array(asked.reshape(-1)), max_length),
    }
    _write(folder / SEQUENCES, columns, meta, [input_ids, lengths, asked])


def write_stream(
    folder: Path, tokens: NDArray[np.int32], *, vocab_size: int, tokenizer: str
) -> None:
    """Write a continuous text of tokens [M]."""
    meta = {"kind": "stream", "vocab_size": vocab_size, "tokenizer": tokenizer}
    _write(folder / STREAM, {"token": pa.array(tokens.astype(np.int32))}, meta, [tokens])


def read_stream(folder: Path) -> NDArray[np.int32]:
    """The tokens [M] of ``folder/stream.arrow``.

    Raises:
        InputError, CorruptError: as for :class:`TokenSet`.
    """
    table, meta = _read(folder / STREAM, "stream", {"token": pa.int32()})
    tokens: NDArray[np.int32] = table.column("token").to_numpy()
    _check_content(folder / STREAM, meta, [tokens])
    return tokens


Content = list[NDArray[np.int32] | NDArray[np.bool_]]


def _write(path: Path, columns: dict[str, Any], meta: dict[str, Any], content: Content) -> None:
    meta = {**meta, "sha256": _digest(content)}
    meta = {**meta, "fingerprint": fingerprint(meta)}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(meta).encode()})
    with (
        atomic_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def _digest(content: Content) -> str:
    digest = hashlib.sha256()
    for array in content:
        stored = array if array.dtype == bool else array.astype(np.int32, copy=False)
        digest.update(np.ascontiguousarray(stored).data)
    return digest.hexdigest()


def _check_content(path: Path, meta: dict[str, Any], content: Content) -> None:
    if _digest(content) != meta["sha256"]:
        raise CorruptError(f"{path} is damaged (its checksum differs); rerun the tokens stage")


def _read(path: Path, kind: str, columns: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # lengths and offsets may point anywhere
        meta = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; run the tokens stage") from None
    except (pa.ArrowException, OSError, MemoryError, ValueError, RecursionError) as error:
        if trouble_of(error) is not None:
            raise
        why = " ".join(str(error).split())
        raise CorruptError(f"{path} cannot be read ({why}); rerun the tokens stage") from None
    complete = columns.keys() <= set(table.column_names)
    if not isinstance(meta, dict) or meta.get("kind") != kind or not complete:
        raise CorruptError(f"{path} does not hold lutqat {kind}; rerun the tokens stage")
    _check_description(path, meta, table, columns)
    return table, meta


def _check_description(
    path: Path, meta: dict[str, Any], table: Any, columns: dict[str, Any]
) -> None:
    """Check that ``meta`` is what was written and that the columns are of the types it implies.

    Raises:
        CorruptError: one of them is not.
    """
    rest = {key: value for key, value in meta.items() if key != "fingerprint"}
    try:
        intact = meta.get("fingerprint") == fingerprint(rest)
    except (ValueError, RecursionError):
        intact = False
    if intact:
        length = meta.get("max_length", 0)
        wanted = {n: pa.list_(k, length) if n in _PER_TOKEN else k for n, k in columns.items()}
        intact = wanted == {field.name: field.type for field in table.schema}
    if not intact or any(_nulls(column) for column in table.columns):
        raise CorruptError(f"{path} is damaged (its description differs); rerun the tokens stage")


def _nulls(column: Any) -> int:
    nested = pa.types.is_fixed_size_list(column.type)
    return int(column.null_count + (column.combine_chunks().flatten().null_count if nested else 0))
