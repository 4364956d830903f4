"""Running the teacher over token rows and writing what it says into cache shards.

Shapes: B rows of a batch, L tokens, P = L - 1 predicting positions, D hidden, V vocabulary,
K top candidates, R negatives, n temperatures, C positions of a chunk.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.compiled import fused
from lib.base.errors import CorruptError, InputError, LutqatError, MismatchError, NonFiniteError
from lib.base.files import atomic_folder, read_json, write_json
from lib.base.progress import track
from lib.base.workers import is_main, rank, wait_for_everyone, world_size
from lib.cache.codec import encode
from lib.cache.sampled import SampledBatches
from lib.cache.shards import (
    CacheReader,
    ShardEntry,
    check_shard,
    shard_name,
    write_index,
    write_shard,
)
from lib.cache.spec import CacheSpec, draw_negatives, draw_shifts
from lib.capture.sampled import read_sampled
from lib.text.sequences import TokenSet

CHUNK_BYTES = 32 * 2**20  # of float32 logits that exist at a time
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 1e-2  # of the largest logit: what bfloat16 loses (2^-8), plus a little
_WORTH_COMPILING = 2**20  # logits of a chunk
_HALF_MIN = torch.finfo(torch.float16).min


def build_cache(
    model: PreTrainedModel,
    tokens: TokenSet,
    spec: CacheSpec,
    out: Path,
    scratch: Path,
    *,
    batch_size: int,
    shard_sequences: int,
    device: torch.device,
) -> None:
    """Write the teacher's cache of one token set to the folder ``out``, replacing it whole.

    Finished shards stay in ``scratch`` until its owner deletes it: a build killed at any moment
    goes on with the unfinished shards and ends with the same bytes, since the rows of a shard
    are forwarded in the same batches whatever happened before. Several processes share the
    shards; the first of them writes ``out``. (``out`` gets links to them, not
    a second copy, where the file system can.)

    Args:
        scratch: belongs to this spec, ``batch_size`` and split alone.

    Raises:
        InputError: no token rows, or a model whose logits are not ``head @ hidden``.
        MismatchError: tokens, spec and model do not belong together.
        NonFiniteError: the teacher's logits are NaN or infinite; names the row.
    """
    check_inputs(model, tokens, spec)
    scratch.mkdir(parents=True, exist_ok=True)
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    with torch.inference_mode():
        check_head(model, tokens)
        _fill(model, tokens, spec, scratch, batch_size, shard_sequences)
    wait_for_everyone()
    if is_main():
        _publish(scratch, out, spec, _plan(len(tokens.input_ids), shard_sequences))


def check_inputs(model: PreTrainedModel, tokens: TokenSet, spec: CacheSpec) -> None:
    """Check that model, tokens and spec belong together.

    Raises:
        InputError, MismatchError: see :func:`build_cache`.
    """
    for key, found in (
        ("split", tokens.meta["split"]),
        ("tokens", tokens.meta["fingerprint"]),
        ("tokenizer", tokens.meta["tokenizer"]),
    ):
        if found != getattr(spec, key):
            raise MismatchError(
                f"the {tokens.meta['split']} tokens have {key} {found}, the cache is to have "
                f"{getattr(spec, key)}; rerun the tokens stage with this teacher"
            )
    ids = tokens.input_ids
    if not len(ids):
        raise InputError(f"the {spec.split} split has no token rows; give the tokens stage text")
    width = _head_weight(model).shape[0]
    if spec.vocab_size != width:
        raise MismatchError(f"the teacher has {width} logits, the cache asks {spec.vocab_size}")
    if int(ids.max()) >= width or int(ids.min()) < 0:
        raise MismatchError(
            f"the {spec.split} tokens go from {ids.min()} to {ids.max()}, the teacher's "
            f"vocabulary has {width}; rerun the tokens stage with this teacher's tokenizer"
        )
    if ids.shape[1] != spec.max_length:
        raise MismatchError(
            f"the {spec.split} tokens have {ids.shape[1]} per row, the cache asks {spec.max_length}"
        )
    lengths = tokens.lengths
    if int(lengths.min()) < 1 or int(lengths.max()) > spec.max_length:
        raise CorruptError(
            f"the {spec.split} tokens have rows of {lengths.min()} to {lengths.max()} tokens; "
            f"1 to {spec.max_length} are possible: rerun the tokens stage"
        )


def _head_weight(model: PreTrainedModel) -> Tensor:
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no output head; use a causal language model")
    return head.weight


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    # No attention mask: padding is on the right, where causal attention never looks.
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def check_head(model: PreTrainedModel, tokens: TokenSet) -> None:
    """Check, on a few tokens, that the model's logits are ``head @ hidden`` and nothing more.

    Cache and training compute them so; a family that scales, caps or shifts its logits
    afterwards (Gemma 2, Cohere, Granite) would be distilled from wrong numbers.

    Raises:
        InputError: they are something else.
    """
    row = np.asarray(tokens.input_ids[0, : min(_PROBE_TOKENS, int(tokens.lengths[0]))])
    ids = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = (_hidden(model, ids) @ _head_weight(model).T).float()
    if not torch.isfinite(expected).all():
        return  # reported with its row by the build
    if (found - expected).abs().max() > _PROBE_TOLERANCE * expected.abs().max():
        raise InputError(
            f"{type(model).__name__} transforms its logits after the head (scaling, capping or a "
            "bias), which is not supported; choose a teacher with a plain linear head"
        )


class _Shard(NamedTuple):
    """A shard that is to hold rows ``first`` to ``stop``."""

    number: int
    first: int
    stop: int


def _plan(rows: int, shard_sequences: int) -> list[_Shard]:
    starts = range(0, rows, shard_sequences)
    return [_Shard(n, at, min(at + shard_sequences, rows)) for n, at in enumerate(starts)]


def _entry_file(folder: Path, shard: _Shard) -> Path:
    """Where the index entry of a finished shard waits until all are finished."""
    return (folder / shard_name(shard.number)).with_suffix(".json")


def _fill(
    model: PreTrainedModel,
    tokens: TokenSet,
    spec: CacheSpec,
    folder: Path,
    batch_size: int,
    shard_sequences: int,
) -> None:
    """Complete this process's share of the shards in ``folder``."""
    plan = _plan(len(tokens.input_ids), shard_sequences)
    missing = [shard for shard in plan if _finished(folder, spec, shard) is None]
    wait_for_everyone()  # until all have looked: their shares must not overlap
    mine = missing[rank() :: world_size()]
    batches = [
        (shard, first, min(first + batch_size, shard.stop))
        for shard in mine
        for first in range(shard.first, shard.stop, batch_size)
    ]
    parts: list[dict[str, np.ndarray]] = []
    for shard, first, stop in track(batches, len(batches), f"cache {spec.split}"):
        parts.append(capture_rows(model, tokens, spec, first, stop))
        if stop == shard.stop:
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            entry = write_shard(folder, shard.number, spec, shard.first, columns)
            about = {"spec": spec.fingerprint, "entry": dataclasses.asdict(entry)}
            write_json(_entry_file(folder, shard), about)
            parts = []


def _finished(folder: Path, spec: CacheSpec, shard: _Shard) -> ShardEntry | None:
    """The entry of a shard that an earlier, killed build finished and that is intact."""
    try:
        about = read_json(_entry_file(folder, shard))
        entry = ShardEntry(**about["entry"])
        planned = (shard_name(shard.number), shard.first, shard.stop - shard.first)
        if (entry.file, entry.first, entry.rows) != planned or about["spec"] != spec.fingerprint:
            return None
        check_shard(folder, spec, entry)
    except (LutqatError, TypeError, KeyError):
        return None
    return entry


def capture_rows(
    model: PreTrainedModel, tokens: TokenSet, spec: CacheSpec, first: int, stop: int
) -> dict[str, np.ndarray]:
    """One forward pass over rows ``first`` to ``stop``; an array for each of ``spec.columns()``.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    ids = np.array(tokens.input_ids[first:stop], dtype=np.int32)
    lengths = np.array(tokens.lengths[first:stop], dtype=np.int32)
    columns = {"input_ids": ids, "length": lengths}
    device = model.device
    hidden = _hidden(model, torch.from_numpy(ids).long().to(device))[:, :-1]
    read: Callable[[Tensor, Tensor, CacheSpec], dict[str, Tensor]] = _read_logits
    if spec.targets == "sampled":
        read = read_sampled
        shifts = np.concatenate([draw_shifts(spec, row) for row in range(first, stop)])
        given = torch.from_numpy(shifts).to(device)
    else:
        columns["negative_ids"] = np.stack([draw_negatives(spec, n) for n in range(first, stop)])
        shared = torch.from_numpy(columns["negative_ids"]).long().to(device)
        given = shared[:, None].expand(-1, spec.positions, -1).flatten(0, 1)
    flat = hidden.flatten(0, 1)  # [B * P, D]
    weight = _head_weight(model)
    size = max(1, CHUNK_BYTES // (4 * spec.vocab_size))
    parts = []
    for start in range(0, len(flat), size):
        logits = flat[start : start + size] @ weight.T
        part = read(logits.float(), given[start : start + size], spec)
        _check_finite(part.pop("finite"), start, first, spec)
        parts.append({name: value.cpu().numpy() for name, value in part.items()})
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        columns[name] = values.reshape(stop - first, spec.positions, *values.shape[1:])
    return encode(spec, columns)


def _sums(logits: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp ``[C]``, smallest logit ``[C]``, and logsumexp(log p / T) per T ``[C, n]``."""
    largest = logits.amax(dim=1, keepdim=True)
    below = logits - largest
    partition = below.exp().sum(dim=1).log()
    scaled = [(below / t).exp().sum(dim=1).log() - partition / t for t in temperatures]
    stacked = torch.stack(scaled, dim=1) if scaled else logits.new_empty(len(logits), 0)
    return largest[:, 0] + partition, logits.amin(dim=1), stacked


def _read_logits(logits: Tensor, negatives: Tensor, spec: CacheSpec) -> dict[str, Tensor]:
    """What is kept of a chunk: ``logits [C, V]`` float32, ``negatives [C, R]`` ids."""
    logsumexp, smallest, scaled = fused(_sums, logits, spec.temperatures, worth=_WORTH_COMPILING)
    top = logits.topk(spec.top_k, dim=1)
    dtype = torch.float16 if spec.codec == "raw" else torch.float32

    def logprobs(values: Tensor) -> Tensor:
        return (values - logsumexp[:, None]).clamp(min=_HALF_MIN).to(dtype)

    return {
        "topk_ids": top.indices.int(),
        "topk_logprobs": logprobs(top.values),
        "negative_logprobs": logprobs(logits.gather(1, negatives)),
        "logsumexp": logsumexp,
        "scaled_logsumexp": scaled,
        # the smallest catches NaN and -inf, the log-sum-exp NaN and +inf
        "finite": smallest.isfinite() & logsumexp.isfinite(),
    }


def _check_finite(finite: Tensor, start: int, first: int, spec: CacheSpec) -> None:
    if not finite.all():
        place = start + int((~finite).nonzero()[0])
        row, position = first + place // spec.positions, place % spec.positions
        raise NonFiniteError(
            f"the teacher's logits at row {row}, position {position} of the {spec.split} tokens "
            "are NaN or infinite; check the teacher's weights, then rerun (finished shards are "
            "kept)"
        )


def _publish(scratch: Path, out: Path, spec: CacheSpec, plan: list[_Shard]) -> None:
    """Make ``out`` hold the finished cache of ``scratch``."""
    entries = [ShardEntry(**read_json(_entry_file(scratch, shard))["entry"]) for shard in plan]
    with atomic_folder(out) as folder:
        for entry in entries:
            try:
                os.link(scratch / entry.file, folder / entry.file)
            except OSError:  # another file system, or one without links
                shutil.copyfile(scratch / entry.file, folder / entry.file)
        write_index(folder, spec, sum(entry.rows for entry in entries), entries)


def cache_statistics(folder: Path) -> dict[str, Any]:
    """Figures of a finished cache: sequences, predicted tokens, size and kept probability.

    ``topk_mass`` is the mean, over positions that predict a real token, of the probability that
    the teacher gives its top k; ``sampled_mass``, of targets that were drawn, that of the ids kept,
    at the temperature they were drawn at.
    """
    reader = CacheReader(folder)
    tokens, mass = 0, 0.0
    for start in range(0, len(reader), 64):
        mask, logprobs = _kept(reader, np.arange(start, min(start + 64, len(reader))))
        tokens += int(mask.sum())
        mass += float(logprobs.double().exp().sum(dim=2)[mask].sum())
    return {
        "sequences": len(reader),
        "tokens": tokens,
        "bytes_per_token": round(reader.spec.bytes_per_token(), 1),
        f"{reader.spec.targets}_mass": round(mass / max(tokens, 1), 6),
    }


def _kept(reader: CacheReader, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mask ``[B, P]`` and log-probabilities ``[B, P, K]`` of the ids that are kept."""
    if reader.spec.targets == "sampled":
        sampled = SampledBatches(reader).batch(rows)
        return sampled.mask, sampled.logprobs
    batch = reader.batch(rows)
    return batch.mask, batch.topk_logprobs


def cache_metrics(folder: Path) -> dict[str, Any]:
    """Figures of the training split, with the size of the validation split."""
    train, val = (cache_statistics(folder / split) for split in ("train", "val"))
    return {**train, "val_sequences": val["sequences"], "val_tokens": val["tokens"]}
