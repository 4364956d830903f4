"""Codec ``packed``: columns of the capture to small records, and back.

A record holds, bit by bit: the header (``lib.cache.layout``), the top k as a set in ascending
order, then the level of each. Shapes: N positions, k of the top k, R negatives, n temperatures, B
rows of P positions.

What is exact: the set, and which token is first. Probabilities relative to each other are rounded
(``lib.cache.levels``). The share of the rest of the vocabulary is kept apart as log odds, at
temperature 1 and at each other one: it does not suffer from the rounding of the levels, and
log-sum-exps are made again from both (the one at temperature 1 of log-probabilities is 0). The
log-sum-exp of the logits is a float16.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lib.cache import levels, sets
from lib.cache.bits import BitReader, put
from lib.cache.layout import NEGATIVE_BITS, NEGATIVE_RANGE, REST_BITS, header, record_bytes
from lib.cache.spec import CacheSpec, draw_negatives, negative_mask

_REST_RANGE = 14.0  # log odds of the rest: shares from 8e-7 on; below, it is none
_REST_TOP = 2**REST_BITS - 1
_NEGATIVE_TOP = 2**NEGATIVE_BITS - 1
_HALF = np.finfo(np.float16)


def encode(spec: CacheSpec, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns as in codec ``raw``, as ``spec.codec`` stores them.

    For ``packed`` log-probabilities may, and had better, be float32.
    """
    if spec.codec == "raw":
        return dict(columns)
    rows = len(columns["length"])
    return {
        "input_ids": columns["input_ids"],
        "length": columns["length"],
        "records": _records(spec, columns).reshape(rows, spec.positions, -1),
        "negative_levels": _negative_levels(spec, columns),
    }


def decode(
    spec: CacheSpec, rows: np.ndarray, stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Columns of codec ``raw``, log-probabilities in float32 where they were packed.

    Args:
        rows: numbers ``[B]`` of the rows, from which their negatives are drawn again.
        stored: the columns of these rows.
    """
    if spec.codec == "raw":
        return dict(stored)
    drawn = [draw_negatives(spec, int(row)) for row in rows]
    return {
        "input_ids": stored["input_ids"],
        "length": stored["length"],
        **_read_records(spec, stored["records"]),
        "negative_ids": np.stack(drawn) if drawn else np.empty((0, spec.negatives), np.int32),
        "negative_logprobs": _read_negatives(spec, stored["negative_levels"]),
    }


def _rest_code(inside: np.ndarray) -> np.ndarray:
    """Code of the log odds of ``1 - inside``; 0 = nothing but rounding is outside."""
    rest = 1 - inside
    none = rest < 1 / (1 + np.exp(_REST_RANGE))
    rest = np.where(none, 0.5, np.minimum(rest, 1 - 1e-9))
    odds = np.log(rest / (1 - rest))
    code = 1 + np.rint((odds + _REST_RANGE) / (2 * _REST_RANGE) * (_REST_TOP - 1))
    return np.where(none, 0, np.clip(code, 1, _REST_TOP)).astype(np.int64)


def _read_rest(code: np.ndarray) -> np.ndarray:
    """``log(1 / inside)`` of a code."""
    odds = (code - 1) / (_REST_TOP - 1) * (2 * _REST_RANGE) - _REST_RANGE
    return np.where(code == 0, 0.0, np.log1p(np.exp(odds)))


def _records(spec: CacheSpec, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Records of all positions, uint8 ``[N, S]``."""
    k = spec.top_k
    ids = columns["topk_ids"].reshape(-1, k)
    order = ids.argsort(axis=1)
    ids = np.take_along_axis(ids, order, axis=1).astype(np.int64)
    logprobs = columns["topk_logprobs"].reshape(-1, k).astype(np.float64)
    logprobs = np.take_along_axis(logprobs, order, axis=1)
    gaps, set_order, set_kind = sets.choose(ids, spec.vocab_size)

    fields = header(k, spec.temperatures)
    size = record_bytes(spec.vocab_size, k, spec.temperatures, spec.level_bits)
    bits = np.zeros((len(ids), 8 * size), dtype=np.uint8)
    start = np.full(len(ids), sum(fields.values()))
    start = sets.put_set(bits, start, gaps, set_order, set_kind, spec.vocab_size)
    found = levels.quantize(logprobs, 8 * size - start)
    levels.put_levels(bits, start, found)

    half = np.clip(columns["logsumexp"].reshape(-1), _HALF.min, _HALF.max).astype(np.float16)
    values = {
        "logsumexp": half.view(np.uint16),
        "first": order.argmin(axis=1),
        "set_kind": set_kind,
        "set_order": set_order,
        "level_order": found.order,
        "offset": found.offset,
        "rest": _rest_code(np.exp(logprobs).sum(axis=1)),
    }
    scaled = columns["scaled_logsumexp"].reshape(len(ids), -1).astype(np.float64)
    for column, t in enumerate(spec.temperatures):
        if t != 1:
            inside = np.exp(logprobs / t - scaled[:, column, None]).sum(axis=1)
            values[f"rest_{t}"] = _rest_code(inside)
    lengths = np.array(list(fields.values()))
    begins = np.broadcast_to(np.cumsum(lengths) - lengths, (len(ids), len(lengths)))
    content = np.stack([values[name].astype(np.int64) for name in fields], axis=1)
    put(bits, begins, content, np.broadcast_to(lengths, begins.shape))
    return np.packbits(bits, axis=1)


def _read_records(spec: CacheSpec, records: np.ndarray) -> dict[str, np.ndarray]:
    """Columns ``[B, P, ...]`` of records uint8 ``[B, P, S]``; the top k most likely first."""
    rows, positions, size = records.shape
    reader = BitReader(records.reshape(-1, size))
    fields = header(spec.top_k, spec.temperatures)
    lengths = np.array(list(fields.values()))[None]
    begins = np.cumsum(lengths, axis=1) - lengths
    content = reader.fields(np.broadcast_to(begins, (rows * positions, len(fields))), lengths)
    value = dict(zip(fields, content.T, strict=True))

    start = np.full(rows * positions, lengths.sum())
    set_code = (value["set_order"], value["set_kind"] == 1)
    ids, start = sets.read_set(reader, start, spec.top_k, *set_code, spec.vocab_size)
    n = levels.read_levels(reader, start, spec.top_k, value["level_order"])
    logprobs = levels.dequantize(n, value["offset"]) - _read_rest(value["rest"])[:, None]
    # the most likely first; ties go by id, but for the first, which has no rival
    rank = -n
    rank[np.arange(len(n)), value["first"]] = np.iinfo(rank.dtype).min
    order = rank.argsort(axis=1, kind="stable")
    ids, logprobs = (np.take_along_axis(x, order, axis=1) for x in (ids, logprobs))

    scaled = np.zeros((len(n), len(spec.temperatures)), dtype=np.float32)
    for column, t in enumerate(spec.temperatures):
        if t != 1:
            inside = np.log(np.exp(logprobs / t).sum(axis=1))
            scaled[:, column] = inside + _read_rest(value[f"rest_{t}"])
    half = value["logsumexp"].astype(np.uint16).view(np.float16)
    flat = {
        "topk_ids": ids.astype(np.int32),
        "topk_logprobs": logprobs.astype(np.float32),
        "logsumexp": half.astype(np.float32),
        "scaled_logsumexp": scaled,
    }
    return {name: x.reshape(rows, positions, *x.shape[1:]) for name, x in flat.items()}


def _negative_levels(spec: CacheSpec, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Levels between a position's smallest and largest negative, uint8 ``[B, P, S]``."""
    values = columns["negative_logprobs"].astype(np.float32)
    if not spec.negatives:
        return np.empty((*values.shape[:2], 0), dtype=np.uint8)
    ids = (torch.from_numpy(columns[name]).long() for name in ("negative_ids", "topk_ids"))
    usable = negative_mask(*ids).numpy()  # the others, likely ones, would only widen the range
    some = usable.any(axis=2, keepdims=True)
    low = np.where(usable, values, np.inf).min(axis=2, keepdims=True)
    high = np.where(usable, values, -np.inf).max(axis=2, keepdims=True)
    ends = np.where(some, np.concatenate([low, high], axis=2), 0).astype("<f2")
    low, span = _range(ends)
    level = np.rint((values - low) / np.where(span > 0, span, 1) * _NEGATIVE_TOP)
    level = np.clip(level, 0, _NEGATIVE_TOP).astype(np.uint8)
    level = np.concatenate([level, level[:, :, : spec.negatives % 2]], axis=2)
    pairs = level[:, :, ::2] << NEGATIVE_BITS | level[:, :, 1::2]
    return np.concatenate([ends.view(np.uint8), pairs], axis=2)


def _read_negatives(spec: CacheSpec, stored: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 ``[B, P, R]`` of levels uint8 ``[B, P, S]``."""
    if not spec.negatives:
        return np.empty((*stored.shape[:2], 0), dtype=np.float32)
    low, span = _range(np.ascontiguousarray(stored[:, :, :NEGATIVE_RANGE]).view("<f2"))
    pairs = stored[:, :, NEGATIVE_RANGE:]
    level = np.stack([pairs >> NEGATIVE_BITS, pairs & _NEGATIVE_TOP], axis=3)
    level = level.reshape(*pairs.shape[:2], -1)[:, :, : spec.negatives]
    return low + level * (span / np.float32(_NEGATIVE_TOP))


def _range(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest value and span, float32 ``[B, P, 1]``, of float16 ``[B, P, 2]``."""
    ends = ends.astype(np.float32)
    return ends[:, :, :1], ends[:, :, 1:] - ends[:, :, :1]
