"""Reading all of a cache once, to find whatever is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.base.files import fingerprint, read_json
from lib.cache.codec import decode
from lib.cache.shards import INDEX, CacheIndex, check_shard, map_shard, read_index
from lib.cache.spec import CacheSpec, draw_negatives
from lib.distill.sampling import importance_weights

_ROWS = 64  # decoded at a time
_SHARED = ("teacher", "tokenizer", "vocab_size", "max_length", "top_k", "temperatures", "codec")
_REMEDY = "delete the cache folder and rerun the cache stage"


def cache_folders(folder: Path) -> list[Path]:
    """``folder`` itself where it is the cache of one split, else the caches in it.

    Raises:
        InputError: there is none.
    """
    if (folder / INDEX).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    if not found:
        raise InputError(f"{folder} holds no teacher cache; give data/cache or one split of it")
    return found


def verify(folder: Path) -> int:
    """Check every byte and value of the caches in ``folder``; returns the number of rows.

    Checked are: the index against its digest and fingerprint, every shard's SHA-256, rows without
    gap; ids in the vocabulary and distinct, lengths, negatives as drawn, numbers finite and
    probabilities at most 1, the likeliest first, weights of drawn ids that sum to 1; that all
    splits have one teacher.

    Raises:
        InputError: there is no cache.
        CorruptError: the first fault, by file, row and column.
    """
    rows, specs = 0, []
    for place in cache_folders(folder):
        try:
            index = read_index(place)
            rows += _check_split(place, index)
        except MismatchError as error:
            raise CorruptError(str(error)) from None
        specs.append((place, index.spec))
    first, known = specs[0]
    for place, spec in specs[1:]:
        for key in _SHARED:
            one, other = getattr(known, key), getattr(spec, key)
            if one != other:
                raise CorruptError(f"{first} has {key} {one}, {place} has {other}; {_REMEDY}")
    return rows


def _check_split(folder: Path, index: CacheIndex) -> int:
    """Check one split; returns its rows."""
    path, spec = folder / INDEX, index.spec
    body = read_json(path)
    found, wanted = body["fingerprint"], fingerprint(body["spec"])
    if found != wanted:
        raise CorruptError(f"{path} has fingerprint {found}, not {wanted}; {_REMEDY}")
    if not index.complete:
        raise CorruptError(f"{folder} is unfinished; rerun the cache stage")
    row = 0
    for entry in index.shards:
        file = folder / entry.file
        check_shard(folder, spec, entry)
        stored = map_shard(file, spec)
        held = len(stored["length"])
        if (entry.first, entry.rows) != (row, held):
            raise CorruptError(
                f"{file} holds {held} rows from {row} on, the index says {entry.rows} from "
                f"{entry.first} on; {_REMEDY}"
            )
        for start in range(0, held, _ROWS):
            part = {name: values[start : start + _ROWS] for name, values in stored.items()}
            rows = row + np.arange(start, min(start + _ROWS, held))
            for name, fault, good in _faults(spec, rows, part, str(file)):
                if not good.all():
                    bad = rows[int(np.flatnonzero(~good)[0])]
                    raise CorruptError(f"{file}: row {bad}, {name}: {fault}; {_REMEDY}")
        row += held
    return row


def _every(good: np.ndarray) -> np.ndarray:
    """Which rows ``[B]`` are good in every place."""
    return np.logical_and.reduce(good.reshape(len(good), -1), axis=1)


def _known(spec: CacheSpec, ids: np.ndarray) -> tuple[str, np.ndarray]:
    good = _every((ids >= 0) & (ids < spec.vocab_size))
    return f"ids outside the vocabulary of {spec.vocab_size}", good


def _faults(
    spec: CacheSpec, rows: np.ndarray, stored: dict[str, np.ndarray], file: str
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Column, what would be wrong with it, and which of the rows ``[B]`` are good."""
    length = stored["length"]
    yield "input_ids", *_known(spec, stored["input_ids"])
    yield "length", f"not 1 to {spec.max_length}", (length >= 1) & (length <= spec.max_length)
    if spec.targets == "sampled":
        yield from _sampled_faults(spec, stored)
    else:
        yield from _topk_faults(spec, rows, stored, file)


def _topk_faults(
    spec: CacheSpec, rows: np.ndarray, stored: dict[str, np.ndarray], file: str
) -> Iterator[tuple[str, str, np.ndarray]]:
    try:
        with np.errstate(all="ignore"):  # what is not finite is reported below
            plain = decode(spec, rows, stored)
    except IndexError:
        raise CorruptError(
            f"{file}: rows {rows[0]} to {rows[-1]}: a record ends too early; {_REMEDY}"
        ) from None
    yield "topk_ids", *_known(spec, plain["topk_ids"])
    yield "topk_ids", "the same id twice", _every(np.diff(np.sort(plain["topk_ids"], axis=2)) > 0)
    drawn = np.stack([draw_negatives(spec, int(row)) for row in rows])
    yield "negative_ids", "not those of seed and row", _every(plain["negative_ids"] == drawn)
    for name in ("topk_logprobs", "negative_logprobs", "logsumexp", "scaled_logsumexp"):
        yield name, "not finite", _every(np.isfinite(plain[name]))
    top = plain["topk_logprobs"].astype(np.float32)
    yield "topk_logprobs", "above 0, probability 1", _every(top <= 1e-5)
    yield "topk_logprobs", "not in descending order", _every(np.diff(top, axis=2) <= 0)


def _sampled_faults(
    spec: CacheSpec, stored: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    for name in ("sample_ids", "top1_ids"):
        yield name, *_known(spec, stored[name])
    yield "sample_ids", "not in ascending order", _every(np.diff(stored["sample_ids"], axis=2) > 0)
    for name in ("sample_logprobs", "threshold"):
        yield name, "not finite", _every(np.isfinite(stored[name]))
    logprobs = stored["sample_logprobs"].astype(np.float32)
    yield "sample_logprobs", "above 0, probability 1", _every(logprobs <= 1e-5)
    if spec.sample_power == 1:
        threshold = torch.tensor(stored["threshold"])
        weights = importance_weights(torch.from_numpy(logprobs), threshold, 1.0)
        sums = weights.double().sum(dim=2).numpy()
        # float16 rounds log p by 2^-11 of it at most, and the mean of -log p is at most log V
        rounding = 1e-4 + 2**-11 * math.log(spec.vocab_size)
        yield "threshold", "weights do not sum to 1", _every(np.abs(sums - 1) <= rounding)
