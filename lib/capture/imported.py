"""The reference implementation's teacher caches (``.pt`` shards), made into ours.

Such a shard holds ``input_ids`` and ``attention_mask`` ``[N, L]``, ``topk_idx`` and ``topk_logits``
``[N, L - 1, K]`` and mostly ``rand_idx`` and ``rand_logits`` ``[N, L - 1, R]``: raw logits of a few
tokens. The sum over the vocabulary is not among them, and without it no logit is a probability. So
sequences are imported, and their teacher says again what it thinks of them; its agreement with the
imported top k shows that it is the same teacher. Negatives are drawn anew, once per sequence.

Shapes: N sequences of a file, L tokens, P = L - 1 positions, K top candidates, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.base.files import fingerprint
from lib.base.progress import track
from lib.base.scratch import scratch_folder
from lib.cache.spec import CacheSpec
from lib.capture.build import build_cache
from lib.capture.texts import held_places
from lib.model.load import (
    folder_fingerprint,
    load_causal_lm,
    load_pickled,
    load_tokenizer,
    tokenizer_fingerprint,
)
from lib.params.data import Cache
from lib.text.build import pad_id_of
from lib.text.pack import SHORTEST_ROW
from lib.text.sequences import TokenSet, write_tokens

_KEYS = ("input_ids", "attention_mask", "topk_idx", "topk_logits")
_NEGATIVES = ("rand_idx", "rand_logits")
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PROBES = 8  # sequences that the teacher's own rounding is measured on
_ALLOWANCE = 10
"""Times the KL that the teacher itself shows in bfloat16 (autocast on another device, another
attention kernel); another teacher shows hundreds of times as much."""


@dataclass(frozen=True)
class Probe:
    """A sequence and what its file says about it."""

    file: Path
    ids: Tensor
    """long ``[1, n]``, without padding."""
    topk_ids: Tensor
    """long ``[n - 1, K]``."""
    topk_logits: Tensor
    """float32 ``[n - 1, K]``."""


@dataclass
class Found:
    """What the files hold, without their targets."""

    length: int
    top_k: int
    negatives: int
    rows: list[np.ndarray] = field(default_factory=list)
    """int32 ids of each sequence, without padding."""
    probes: list[Probe] = field(default_factory=list)
    """The longest of the new sequences of every file."""
    largest_id: int = 0
    duplicates: int = 0
    short: int = 0


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    train: int
    val: int
    duplicates: int
    """Sequences that had been there before."""
    short: int
    """Sequences of a single token, which predict nothing."""
    kl: float
    """Largest of the files: KL(teacher || file) of a sequence over its top k, nats per position."""
    limit: float
    """The KL at which it would have been refused."""


def import_cache(
    source: Path,
    out: Path,
    teacher: Path,
    *,
    codec: Literal["raw", "packed"],
    val_fraction: float,
    device: torch.device,
) -> Imported:
    """Write ``out/train`` and ``out/val`` from the ``.pt`` files of ``source``.

    Keys of section `cache` are those of the files (``top_k``, ``negatives``) or their defaults. A
    killed import goes on where it was, except that the files are read again.

    Args:
        val_fraction: share of the sequences, evenly spread, that are held out: at least one.

    Raises:
        InputError: no files, a malformed one (names file and key), or fewer than two sequences.
        MismatchError: the teacher is not the one whose logits the files hold.
    """
    found = read_folder(source)
    marks = {"teacher": folder_fingerprint(teacher), "tokenizer": tokenizer_fingerprint(teacher)}
    kl, limit, model = _agreeing(teacher, found, device)
    kept = Cache.model_construct(top_k=found.top_k, negatives=found.negatives, codec=codec)
    vocabulary = model.config.get_text_config().vocab_size
    parts = hold_out(found.rows, val_fraction)
    ids = fingerprint([hashlib.sha256(row.tobytes()).hexdigest() for row in found.rows])
    key = fingerprint([marks, ids, codec, val_fraction, found.length, device.type])
    with scratch_folder("import", key) as scratch:
        for split, rows in parts.items():
            folder = scratch / f"tokens-{split}"
            _write_rows(folder, rows, found.length, split, teacher, marks["tokenizer"])
            tokens = TokenSet(folder)
            spec = CacheSpec.of(
                kept,
                **marks,
                tokens=tokens.meta["fingerprint"],
                split=split,
                vocab_size=vocabulary,
                max_length=found.length,
            )
            build_cache(
                model,
                tokens,
                spec,
                out / split,
                scratch / split,
                batch_size=kept.batch_size,
                shard_sequences=kept.shard_sequences,
                device=device,
            )
    sizes = {split: len(rows) for split, rows in parts.items()}
    return Imported(**sizes, duplicates=found.duplicates, short=found.short, kl=kl, limit=limit)


def read_folder(source: Path) -> Found:
    """The different sequences of all ``.pt`` files, in the order of their names.

    One file is in memory at a time, the ids of sequences beside it.

    Raises:
        InputError: see :func:`import_cache`.
    """
    files = sorted(source.glob("*.pt")) if source.is_dir() else []
    if not files:
        raise InputError(f"{source} is no folder with .pt files; give the reference's cache folder")
    found: Found | None = None
    seen: set[bytes] = set()
    for file in track(files, len(files), "reading .pt files"):
        tensors = read_shard(file)
        k, length = tensors["topk_idx"].shape[2], tensors["input_ids"].shape[1]
        negatives = tensors["rand_idx"].shape[2] if "rand_idx" in tensors else 0
        if found is None:
            found = Found(length, k, negatives)
        for name, here, first in (
            ("L of input_ids", length, found.length),
            ("K of topk_idx", k, found.top_k),
            ("R of rand_idx", negatives, found.negatives),
        ):
            if here != first:
                raise InputError(
                    f"{file}: {name} is {here}, in {files[0].name} it is {first}; give the files "
                    "of one cache"
                )
        _collect(found, seen, file, tensors)
        del tensors  # before the next file is read
    assert found is not None
    return found


def _collect(found: Found, seen: set[bytes], file: Path, tensors: dict[str, Tensor]) -> None:
    """Add the new sequences of a file."""
    lengths = tensors["attention_mask"].sum(dim=1, dtype=torch.int64).tolist()
    ids = tensors["input_ids"].to(torch.int32).numpy()
    found.largest_id = max(found.largest_id, int(tensors["topk_idx"].max()))
    fresh = []
    for row, length in enumerate(lengths):
        if length < SHORTEST_ROW:
            found.short += 1
            continue
        sequence = ids[row, :length].copy()
        digest = hashlib.sha256(sequence.tobytes()).digest()
        if digest in seen:
            found.duplicates += 1
            continue
        seen.add(digest)
        found.rows.append(sequence)
        found.largest_id = max(found.largest_id, int(sequence.max()))
        fresh.append(row)
    if fresh:
        row = max(fresh, key=lengths.__getitem__)
        n = lengths[row]
        probe = torch.from_numpy(ids[row, :n].copy()).long()[None]
        said = (tensors[key][row, : n - 1] for key in ("topk_idx", "topk_logits"))
        dtypes = (torch.int64, torch.float32)
        copies = [part.to(dtype, copy=True) for part, dtype in zip(said, dtypes, strict=True)]
        found.probes.append(Probe(file, probe, *copies))


def read_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of one ``.pt`` file. Nothing in it is executed (``weights_only=True``).

    Raises:
        InputError: it is no such file; names the key that is wrong.
    """
    content = load_pickled(file, remedy="give the reference's cache as it wrote it")
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no dictionary but {type(content).__name__}")
    names = [*_KEYS, *(name for name in _NEGATIVES if name in content)]
    for name, fault in _faults(content, names):
        raise InputError(f"{file}: {name} {fault}; give the reference's cache as it wrote it")
    return {name: content[name] for name in names}


def _faults(content: dict[Any, Any], names: list[str]) -> Iterator[tuple[str, str]]:
    """Keys and what is wrong with them; each may build on those before."""
    for name in names:
        value = content.get(name)
        if value is None:
            yield name, f"is missing (it has {', '.join(map(str, content)) or 'nothing'})"
        elif not isinstance(value, Tensor):
            yield name, f"is no tensor but {type(value).__name__}"
        elif value.dtype not in (_REAL if name.endswith("logits") else _WHOLE):
            yield name, f"has type {value.dtype}"
        elif value.layout is not torch.strided:
            yield name, f"has layout {value.layout}"
    missing = [name for name in _NEGATIVES if name not in names]
    if len(missing) == 1:
        yield missing[0], "is missing, the other of rand_idx and rand_logits is there"
    ids, mask = content["input_ids"], content["attention_mask"]
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < SHORTEST_ROW:
        yield "input_ids", f"has shape {list(ids.shape)}, not [N, L] with L of 2 and more"
    if mask.shape != ids.shape:
        yield "attention_mask", f"has shape {list(mask.shape)}, input_ids {list(ids.shape)}"
    counted = torch.arange(ids.shape[1]) < mask.sum(dim=1, dtype=torch.int64)[:, None]
    if not torch.equal(mask.bool(), counted) or int(mask.max()) > 1:
        yield "attention_mask", "is not ones and then zeros in every row (padding on the right)"
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= 2**31:
        yield "input_ids", f"holds ids from {smallest} to {largest}"
    for name in names[2:]:
        value = content[name]
        expected = content["topk_idx" if name.startswith("topk") else "rand_idx"].shape
        if value.dim() != 3 or value.shape[:2] != (ids.shape[0], ids.shape[1] - 1):
            yield name, f"has shape {list(value.shape)}, not [N, L - 1, ...] of input_ids"
        if value.shape != expected or (name == "topk_idx" and value.shape[2] < 1):
            yield name, f"has shape {list(value.shape)}, its ids {list(expected)}"
        if name.endswith("idx") and value.numel() and int(value.min()) < 0:
            yield name, f"holds {int(value.min())}"
        if name == "topk_logits" and not value.isfinite().all():
            yield name, "holds numbers that are not finite"


def hold_out(rows: list[np.ndarray], val_fraction: float) -> dict[str, list[np.ndarray]]:
    """The sequences as ``train`` and ``val``: at least one each, evenly spread.

    Raises:
        InputError: fewer than two.
    """
    if len(rows) < 2:
        raise InputError(
            f"the files hold {len(rows)} different sequences; at least 2 are needed, since one is "
            "held out"
        )
    held = held_places(len(rows), val_fraction)
    return {
        "train": [row for number, row in enumerate(rows) if number not in held],
        "val": [row for number, row in enumerate(rows) if number in held],
    }


def _agreeing(teacher: Path, found: Found, device: torch.device) -> tuple[float, float, Any]:
    """The largest KL of a probe, what is allowed, and the teacher.

    Raises:
        MismatchError: a file's top k are not this teacher's.
    """
    if not found.probes:
        raise InputError("the files hold no sequence of two or more tokens")
    rough = load_causal_lm(teacher, torch.bfloat16).to(device)  # type: ignore[arg-type]
    _check_vocabulary(rough, found, teacher)
    probes = found.probes[:_PROBES]
    rounded = [_candidates(rough, probe) for probe in probes]
    del rough
    model = load_causal_lm(teacher).to(device)  # type: ignore[arg-type]
    exact = [_candidates(model, probe) for probe in probes]
    limit = _ALLOWANCE * float(torch.cat(list(map(divergence, exact, rounded))).mean())
    worst = 0.0
    for probe in track(found.probes, len(found.probes), "comparing with the teacher"):
        said = _candidates(model, probe)
        kl = float(divergence(said, probe.topk_logits).mean())
        worst = max(worst, kl)
        if not kl <= limit:
            same = float((said.argmax(dim=1) == probe.topk_logits.argmax(dim=1)).float().mean())
            raise MismatchError(
                f"{probe.file}: its top k are not what {teacher} says: KL {kl:.3g} nats per "
                f"position ({limit:.3g} is allowed, {_ALLOWANCE} times what bfloat16 makes), the "
                f"same first choice at {same:.0%}; give the teacher that the files were made with"
            )
    return worst, limit, model


def _check_vocabulary(model: PreTrainedModel, found: Found, teacher: Path) -> None:
    width = model.config.get_text_config().vocab_size
    if found.largest_id >= width:
        raise MismatchError(
            f"the files hold id {found.largest_id}, the vocabulary of {teacher} has {width}; give "
            "the teacher that the files were made with"
        )


@torch.inference_mode()
def _candidates(model: PreTrainedModel, probe: Probe) -> Tensor:
    """The model's logits of a probe's top k, float32 ``[n - 1, K]``."""
    logits = model(input_ids=probe.ids.to(model.device), use_cache=False).logits[0, :-1]
    return logits.gather(1, probe.topk_ids.to(model.device)).float().cpu()


def divergence(said: Tensor, other: Tensor) -> Tensor:
    """KL(said || other) of the softmaxes of two sets of logits ``[n, K]``: nats ``[n]``."""
    p, q = said.double().log_softmax(dim=1), other.double().log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def _write_rows(
    folder: Path, rows: list[np.ndarray], length: int, split: str, teacher: Path, mark: str
) -> None:
    """Sequences as token rows, padded on the right."""
    tokenizer = load_tokenizer(teacher)
    pad_id = pad_id_of(tokenizer)
    ids = np.full((len(rows), length), pad_id, dtype=np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    about = {"split": split, "vocab_size": len(tokenizer), "pad_id": pad_id, "tokenizer": mark}
    write_tokens(folder, ids, lengths, **about)  # type: ignore[arg-type]
