"""Shards of a teacher cache: Arrow IPC files, memory-mapped, checked, beside an ``index.json``.

A cache folder holds ``shard-00000.arrow``, ... and ``index.json`` (spec, rows, size and SHA-256
of every shard, and a digest over all of it). Each shard is one record batch whose schema
metadata repeats the spec and says which rows it holds, so that a foreign or misplaced shard is
refused by name. Columns with several values per row are flat FixedSizeLists of
``CacheSpec.columns()`` (``lib.cache.codec`` says what packed ones hold); a column of width 0 (no
negatives, say) is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.base.files import atomic_file, fingerprint, read_json, sha256_file, write_json
from lib.cache.codec import decode
from lib.cache.spec import CacheSpec, negative_mask

INDEX = "index.json"
METADATA_KEY = b"lutqat"
_REMEDY = "delete the cache folder and rerun the cache stage"


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One shard's line in the index."""

    file: str
    first: int
    rows: int
    bytes: int
    sha256: str


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.arrow"


def _to_arrow(values: np.ndarray, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    if values.dtype != dtype or values.shape[1:] != shape:
        raise ValueError(
            f"column {name} is {values.dtype} {values.shape}, expected {dtype} [rows, *{shape}]"
        )
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape))) if shape else flat


def write_shard(
    folder: Path, number: int, spec: CacheSpec, first: int, columns: Mapping[str, np.ndarray]
) -> ShardEntry:
    """Write one shard atomically (temporary name, fsync, rename) and return its index entry.

    Args:
        first: row number, within the split, of the shard's first row.
        columns: an array ``[rows, *shape]`` for each of ``spec.columns()``.

    Raises:
        ValueError: a column is missing or has another type, shape or number of rows.
    """
    layout = spec.columns()
    if columns.keys() != layout.keys():
        raise ValueError(f"columns {sorted(columns)} are not {sorted(layout)}")
    rows = len(columns["length"])
    stored = {
        name: _to_arrow(columns[name], name, *column)
        for name, column in layout.items()
        if 0 not in column[1]
    }
    meta = {"kind": "cache", "spec": spec.to_json(), "first": first, "rows": rows}
    schema = pa.schema(
        [pa.field(name, array.type, nullable=False) for name, array in stored.items()],
        metadata={METADATA_KEY: json.dumps(meta, sort_keys=True)},
    )
    path = folder / shard_name(number)
    with atomic_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(list(stored.values()), schema=schema))
        size, digest = temporary.stat().st_size, sha256_file(temporary)
    return ShardEntry(path.name, first, rows, size, digest)


def write_index(folder: Path, spec: CacheSpec, rows: int, shards: Sequence[ShardEntry]) -> None:
    """Write ``index.json``: ``rows`` of the split in all, and the shards finished so far."""
    body = {
        "kind": "cache",
        "fingerprint": spec.fingerprint,
        "spec": spec.to_json(),
        "rows": rows,
        "shards": [dataclasses.asdict(entry) for entry in shards],
    }
    write_json(folder / INDEX, {**body, "digest": fingerprint(body)})


@dataclasses.dataclass(frozen=True)
class CacheIndex:
    """The content of ``index.json``; ``shards`` cover rows 0, 1, ... without gap, maybe not all."""

    spec: CacheSpec
    rows: int
    shards: tuple[ShardEntry, ...]
    digest: str

    @property
    def complete(self) -> bool:
        """Whether the shards cover every row."""
        return sum(entry.rows for entry in self.shards) == self.rows


def read_index(folder: Path) -> CacheIndex:
    """Read and check ``index.json``.

    Raises:
        InputError: there is none.
        CorruptError: it is damaged, edited or of something else.
    """
    path = folder / INDEX
    body = read_json(path)
    try:
        digest = body.pop("digest")
        if body["kind"] != "cache" or digest != fingerprint(body):
            raise CorruptError(f"{path} is damaged or was edited; {_REMEDY}")
        entries = tuple(ShardEntry(**entry) for entry in body["shards"])
        rows, values = body["rows"], body["spec"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise CorruptError(f"{path} is not the index of a teacher cache; {_REMEDY}") from None
    return CacheIndex(CacheSpec.from_json(values, str(path)), rows, entries, digest)


def _shard_metadata(path: Path) -> dict[str, Any]:
    """A shard's own description; empty when it cannot be read."""
    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
        meta = json.loads(metadata[METADATA_KEY])
    except (pa.ArrowException, OSError, MemoryError, KeyError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _damage(path: Path, spec: CacheSpec, entry: ShardEntry, size: int) -> Exception:
    """The most helpful error for a shard that is not what the index says."""
    meta = _shard_metadata(path)
    wanted, found = spec.to_json(), meta.get("spec")
    if isinstance(found, dict) and found != wanted:
        keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
        sides = "; ".join(f"{k} {found.get(k)}, the index says {wanted.get(k)}" for k in keys)
        return MismatchError(f"{path} belongs to another cache ({sides}); {_REMEDY}")
    if size < entry.bytes:
        return CorruptError(f"{path} is short: {size} bytes instead of {entry.bytes}; {_REMEDY}")
    if meta and meta.get("first") != entry.first:
        return CorruptError(
            f"{path} holds rows from {meta.get('first')} on instead of {entry.first}; {_REMEDY}"
        )
    return CorruptError(f"{path} is damaged (its SHA-256 is not the index's); {_REMEDY}")


def check_size(folder: Path, spec: CacheSpec, entry: ShardEntry) -> None:
    """Check that a shard exists and has its size: what can be told without reading it.

    Raises:
        CorruptError, MismatchError: missing, short, or of another cache; names the file.
    """
    path = folder / entry.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing; {_REMEDY}") from None
    if size != entry.bytes:
        raise _damage(path, spec, entry, size)


def check_shard(folder: Path, spec: CacheSpec, entry: ShardEntry) -> None:
    """Check a shard's size and content against its entry.

    Raises:
        CorruptError, MismatchError: missing, short, damaged or foreign; names the file.
    """
    check_size(folder, spec, entry)
    path = folder / entry.file
    if sha256_file(path) != entry.sha256:
        raise _damage(path, spec, entry, entry.bytes)


def map_shard(path: Path, spec: CacheSpec) -> dict[str, np.ndarray]:
    """The columns of a (checked) shard as zero-copy, read-only views ``[rows, *shape]``."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    columns = {}
    for name, (dtype, shape) in spec.columns().items():
        if 0 in shape:
            columns[name] = np.empty((batch.num_rows, *shape), dtype)
            continue
        column = batch.column(name)
        values = column.flatten() if shape else column
        view = values.to_numpy(zero_copy_only=True)
        columns[name] = view.reshape(batch.num_rows, *shape)
    return columns


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_mtime_ns


def moved_fields(batch: Any, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a batch on another device; a copy to a GPU does not wait for it."""
    target = torch.device(device)

    def moved(value: Tensor) -> Tensor:
        if target.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(target, non_blocking=True)
        return value.to(target)

    return {f.name: moved(getattr(batch, f.name)) for f in dataclasses.fields(batch)}


@dataclasses.dataclass(frozen=True)
class CachedBatch:
    """Rows of a cache as tensors; B rows, P = L - 1 positions, K top candidates, R negatives.

    Log-probabilities are the teacher's at temperature 1 over its whole vocabulary. Position p
    predicts ``input_ids[:, p + 1]``.
    """

    input_ids: Tensor
    """long ``[B, L]``, right-padded."""
    mask: Tensor
    """bool ``[B, P]``: the position predicts a real token, not padding."""
    topk_ids: Tensor
    """long ``[B, P, K]``, most likely first."""
    topk_logprobs: Tensor
    """float32 ``[B, P, K]``, as exact as the codec keeps them: raw rounds to float16."""
    negative_ids: Tensor
    """long ``[B, R]``."""
    negative_logprobs: Tensor
    """float32 ``[B, P, R]``, as exact as the codec keeps them."""
    negative_mask: Tensor
    """bool ``[B, P, R]``: usable, that is, not in the position's top k."""
    logsumexp: Tensor
    """float32 ``[B, P]`` of the raw logits."""
    scaled_logsumexp: Tensor
    """float32 ``[B, P, n]``: logsumexp(logprob / T) for each of the spec's temperatures."""

    def to(self, device: torch.device | str) -> CachedBatch:
        """The same batch on another device; a copy to a GPU does not wait for it."""
        return CachedBatch(**moved_fields(self, device))


class CacheReader:
    """Random access to one split's cache, with constant memory.

    Args:
        folder: ``data/cache/train``, say.
        expect: values that fields of the spec must have, for example
            ``{"teacher": fingerprint, "tokens": fingerprint, "vocab_size": 49152}``.

    Raises:
        InputError: no cache there, or one without rows.
        MismatchError: the cache is not the expected one; both sides are named.
        CorruptError: the index is damaged, or a shard is missing or short (content is checked
            when a shard is first touched, and may raise the same then).
    """

    def __init__(self, folder: Path, expect: Mapping[str, Any] | None = None) -> None:
        index = read_index(folder)
        self.folder = folder
        self.spec = index.spec
        self.fingerprint = index.digest
        self.rows = index.rows
        self._shards = index.shards
        self._firsts = np.array([entry.first for entry in index.shards], dtype=np.int64)
        # Nothing stays mapped: pages once touched would count as this process's memory, and the
        # system allows 65,530 mappings. What was checked is only known by its inode and time.
        self._checked: dict[int, tuple[int, int] | None] = {}
        for key, value in (expect or {}).items():
            if getattr(self.spec, key) != value:
                raise MismatchError(
                    f"{folder} was made with {key} {getattr(self.spec, key)}, but {value} is in "
                    "use here; rerun the cache stage, or use what the cache was made with"
                )
        if not index.complete:
            raise CorruptError(f"{folder} is unfinished; rerun the cache stage")
        if not self.rows:
            raise InputError(f"{folder} holds no rows; give the tokens stage more text")
        for entry in self._shards:
            check_size(folder, self.spec, entry)

    def __len__(self) -> int:
        return self.rows

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        """Columns of a shard, whose content is checked when it is first touched and whenever the
        file has been replaced since."""
        entry = self._shards[number]
        path = self.folder / entry.file
        stamp = _stamp(path)
        if stamp is None or self._checked.get(number) != stamp:
            check_shard(self.folder, self.spec, entry)  # raises where there is no file
            self._checked[number] = stamp
        return map_shard(path, self.spec)

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Every column of these rows as stored, ``[B, *shape]``.

        Raises:
            IndexError: a row is not in the cache.
            CorruptError, MismatchError: a shard touched for the first time is not the index's.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a cache of {self.rows}")
        owners = np.searchsorted(self._firsts, rows, side="right") - 1
        layout = self.spec.columns()
        result = {name: np.empty((len(rows), *s), dtype) for name, (dtype, s) in layout.items()}
        for owner in np.unique(owners):
            here = np.flatnonzero(owners == owner)
            local = rows[here] - self._firsts[owner]
            for name, values in self._shard(int(owner)).items():
                result[name][here] = values[local]
        return result

    def sequences(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` sequences (fewer, if there are fewer): input ids long ``[N, L]`` and
        lengths ``[N]``; raises like :meth:`gather`."""
        raw = self.gather(np.arange(min(count, self.rows)))
        return torch.from_numpy(raw["input_ids"]).long(), torch.from_numpy(raw["length"])

    def batch(self, rows: np.ndarray) -> CachedBatch:
        """These rows, in this order, as tensors on the CPU.

        Raises:
            MismatchError: the cache holds sampled targets (:mod:`lib.cache.sampled` reads those).
            IndexError, CorruptError: see :meth:`gather`.
        """
        if self.spec.targets != "topk":
            raise MismatchError(
                f"{self.folder} holds {self.spec.targets} targets, and candidates are wanted; set "
                "cache.targets to topk and rerun the cache stage"
            )
        plain = decode(self.spec, rows, self.gather(rows))
        raw = {name: torch.from_numpy(values) for name, values in plain.items()}
        targets = torch.arange(1, self.spec.max_length)
        topk_ids, negative_ids = raw["topk_ids"].long(), raw["negative_ids"].long()
        return CachedBatch(
            input_ids=raw["input_ids"].long(),
            mask=targets < raw["length"][:, None],
            topk_ids=topk_ids,
            topk_logprobs=raw["topk_logprobs"].float(),
            negative_ids=negative_ids,
            negative_logprobs=raw["negative_logprobs"].float(),
            negative_mask=negative_mask(negative_ids, topk_ids),
            logsumexp=raw["logsumexp"],
            scaled_logsumexp=raw["scaled_logsumexp"],
        )
