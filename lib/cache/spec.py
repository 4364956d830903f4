"""What a cache of teacher outputs holds, and what is random in its rows.

Shapes: N rows (sequences) of L tokens, P = L - 1 positions that predict a next token, K top
candidates, R negatives, n temperatures.

Codec ``raw`` stores numbers as they are. Codec ``packed`` stores, per position, a record of fixed
size (lib/cache/codec.py) and a few bits for each negative, whose ids the reader draws again.

Targets ``topk`` are the likeliest tokens, targets ``sampled`` drawn ones (lib/distill/sampling.py).
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from lib.base.errors import CorruptError, ParamsError
from lib.base.files import fingerprint
from lib.cache.layout import negative_bytes, record_bytes

Codec = Literal["raw", "packed"]
Targets = Literal["topk", "sampled"]
_SAMPLED = ("samples", "sample_temperature", "sample_power")  # fields that `sampled` alone has


class Kept(Protocol):
    """What section `cache` of params.yaml says about the content; see :class:`CacheSpec`."""

    @property
    def top_k(self) -> int: ...
    @property
    def negatives(self) -> int: ...
    @property
    def temperatures(self) -> tuple[float, ...]: ...
    @property
    def seed(self) -> int: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def level_bits(self) -> int: ...
    @property
    def targets(self) -> Targets: ...
    @property
    def samples(self) -> int: ...
    @property
    def sample_temperature(self) -> float: ...
    @property
    def sample_power(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Identity of one split's cache; two caches with equal specs are interchangeable.

    Raises:
        ParamsError: the vocabulary is too small for what is kept, or the codec has no such targets.
    """

    teacher: str
    """Fingerprint of the teacher's folder."""
    tokenizer: str
    """Fingerprint of the tokenizer that made the tokens."""
    tokens: str
    """Fingerprint of the token set, one split of ``data/tokens``."""
    split: str
    """``train`` or ``val``."""
    vocab_size: int
    """Width of the teacher's logits (at least the tokenizer's vocabulary)."""
    max_length: int
    """L, tokens per row, right-padded."""
    top_k: int
    """K, most likely next tokens kept per position."""
    negatives: int
    """R, random tokens kept per row, shared by its positions."""
    temperatures: tuple[float, ...]
    """Temperatures T at which logsumexp(logprob / T) over the vocabulary is kept."""
    seed: int
    """Seed of the negatives."""
    codec: Codec = "raw"
    """How the columns are stored."""
    level_bits: int = 6
    """``packed``: bits for each of the top k's probabilities."""
    targets: Targets = "topk"
    """Which ids are kept. What follows describes ``sampled``, which has none of the top k."""
    samples: int = 64
    """Ids drawn per position, each once."""
    sample_temperature: float = 2.0
    """Temperature T of the distribution they are drawn from."""
    sample_power: float = 1.0
    """Power t of its probabilities that the proposal is proportional to."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.vocab_size:
            raise ParamsError(
                f"cache.top_k = {self.top_k} does not fit the teacher's vocabulary of "
                f"{self.vocab_size}; use 1 to {self.vocab_size}"
            )
        room = self.vocab_size - self.top_k
        if not 0 <= self.negatives <= room:
            raise ParamsError(
                f"cache.negatives = {self.negatives} does not fit beside top_k = {self.top_k} in "
                f"the teacher's vocabulary of {self.vocab_size}; use 0 to {room}"
            )
        if self.max_length < 2:
            raise ParamsError(f"tokens.max_length = {self.max_length}; a row needs at least 2")
        if self.targets == "topk":
            return
        if self.codec != "raw":
            raise ParamsError(
                f"cache.codec = {self.codec}: sampled targets are stored as numbers; set it to "
                "raw, or cache.targets to topk"
            )
        if not 1 <= self.samples <= self.vocab_size:
            raise ParamsError(
                f"cache.samples = {self.samples} does not fit the teacher's vocabulary of "
                f"{self.vocab_size}; use 1 to {self.vocab_size}"
            )

    @classmethod
    def of(cls, kept: Kept, *, split: str, **identity: Any) -> Self:
        """The spec with what ``kept`` says; ``identity`` gives the other fields.

        Only ``train`` is ever sampled: held-out text is judged by the top k, whatever is learned.

        Raises:
            ParamsError: see above.
        """
        names = ["top_k", "negatives", "temperatures", "seed", "codec", "level_bits"]
        if split == "train":
            names += ["targets", *_SAMPLED]
        return cls(split=split, **{name: getattr(kept, name) for name in names}, **identity)

    @property
    def positions(self) -> int:
        """P, positions per row that predict a next token."""
        return self.max_length - 1

    @property
    def fingerprint(self) -> str:
        """Short digest of every field."""
        return fingerprint(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, read back by :meth:`from_json`; without what has no meaning."""
        values = {**dataclasses.asdict(self), "temperatures": list(self.temperatures)}
        if self.targets == "topk":
            for name in ("targets", *_SAMPLED):
                del values[name]
        return values

    @classmethod
    def from_json(cls, values: Any, where: str) -> CacheSpec:
        """The spec written by :meth:`to_json`.

        Raises:
            CorruptError: ``values`` is not such a spec; ``where`` names its file.
        """
        try:
            return cls(**{**values, "temperatures": tuple(values["temperatures"])})
        except (TypeError, KeyError, ParamsError):
            raise CorruptError(
                f"{where} does not describe a teacher cache; rerun the cache stage"
            ) from None

    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape per row of every column, in file order."""
        p = self.positions
        i32, f16, f32 = np.dtype(np.int32), np.dtype(np.float16), np.dtype(np.float32)
        if self.targets == "sampled":
            return {
                "input_ids": (i32, (self.max_length,)),
                "length": (i32, ()),
                "sample_ids": (i32, (p, self.samples)),
                "sample_logprobs": (f16, (p, self.samples)),
                "threshold": (f32, (p,)),
                "top1_ids": (i32, (p,)),
            }
        if self.codec == "packed":
            u8 = np.dtype(np.uint8)
            sizes = (self.vocab_size, self.top_k, self.temperatures, self.level_bits)
            return {
                "input_ids": (i32, (self.max_length,)),
                "length": (i32, ()),
                "records": (u8, (p, record_bytes(*sizes))),
                "negative_levels": (u8, (p, negative_bytes(self.negatives))),
            }
        return {
            "input_ids": (i32, (self.max_length,)),
            "length": (i32, ()),
            "topk_ids": (i32, (p, self.top_k)),
            "topk_logprobs": (f16, (p, self.top_k)),
            "negative_ids": (i32, (self.negatives,)),
            "negative_logprobs": (f16, (p, self.negatives)),
            "logsumexp": (f32, (p,)),
            "scaled_logsumexp": (f32, (p, len(self.temperatures))),
        }

    def bytes_per_token(self) -> float:
        """Bytes of one row's columns, divided by L."""
        row = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.columns().values())
        return row / self.max_length


def draw_negatives(spec: CacheSpec, row: int) -> np.ndarray:
    """The R negative token ids (int32 ``[R]``) of one row, in random order.

    Uniform over the vocabulary, without replacement, a function of (seed, split, row) alone:
    neither batch nor shard layout matters. A negative may be in the top k of a position;
    :func:`negative_mask` excludes it there.
    """
    generator = np.random.default_rng([spec.seed, zlib.crc32(spec.split.encode()), row])
    drawn = generator.choice(spec.vocab_size, size=spec.negatives, replace=False)
    return drawn.astype(np.int32)


def draw_shifts(spec: CacheSpec, row: int) -> np.ndarray:
    """All that is random in the sampled targets of one row: a number in [0, 1) for each of its P
    positions, float32 ``[P]``, a function of (seed, split, row) alone."""
    seeds = [spec.seed, zlib.crc32(spec.split.encode()), row, zlib.crc32(b"sampled")]
    return np.random.default_rng(seeds).random(spec.positions, dtype=np.float32)


def negative_mask(negative_ids: Tensor, topk_ids: Tensor) -> Tensor:
    """Which negatives count at which position: those that are not in its top k.

    Args:
        negative_ids: long ``[B, R]``, distinct within a row; topk_ids: long ``[B, P, K]``.

    Returns:
        bool ``[B, P, R]``, True = usable.
    """
    rows, positions, k = topk_ids.shape
    count = negative_ids.shape[1]
    # one column more than needed collects the top-k ids that are not negatives
    mask = torch.ones(rows, positions, count + 1, dtype=torch.bool, device=topk_ids.device)
    if count:
        ordered, order = negative_ids.sort(dim=1)
        wanted = topk_ids.reshape(rows, positions * k).contiguous()
        place = torch.searchsorted(ordered, wanted).clamp_(max=count - 1)
        found = ordered.gather(1, place) == wanted
        column = torch.where(found, order.gather(1, place), count)
        mask.scatter_(2, column.view(rows, positions, k), False)
    return mask[..., :count]
