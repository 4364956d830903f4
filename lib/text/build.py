"""Sources -> token rows of the three splits: read, render, tokenize, pack.

A title belongs to one split (lib/text/split.py). Titles of the test sources belong to the test
split wherever they occur, so nothing that is measured on is ever trained on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib.base.errors import InputError
from lib.base.progress import track
from lib.text.chat import Rendered, render
from lib.text.documents import OWN_TEXT, Document, Instruction, Source, read_source
from lib.text.pack import Encoded, Packer, Rows
from lib.text.split import SPLITS, Split, canonical, split_of

HELD_OUT_CHARACTERS = 4000
"""A held-out document counts with so many first characters: a small measurement then sees many
documents instead of one long one."""
STREAM_CHARACTERS = 400_000
"""Characters of perplexity text that each source may add."""

_BATCH = 256  # documents tokenized at a time
_SMALLEST_ROUND = 16  # sequences that the teacher is asked for at a time, at least


class Settings(Protocol):
    """The `tokens` section of params.yaml."""

    @property
    def train(self) -> Sequence[Source]: ...
    @property
    def test(self) -> Sequence[Source]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def packing(self) -> bool: ...
    @property
    def val_fraction(self) -> float: ...
    @property
    def test_fraction(self) -> float: ...
    @property
    def val_sequences(self) -> int: ...
    @property
    def test_sequences(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Author(Protocol):
    """A teacher that writes text."""

    def __call__(self, first: int, count: int, length: int, seed: int) -> Iterable[list[int]]:
        """Sequences ``first`` to ``first + count - 1`` of ``length`` token ids each; what the n-th
        holds depends on n, ``length`` and ``seed`` alone."""


@dataclass(frozen=True)
class Tokens:
    """What the tokens stage writes."""

    splits: dict[Split, Rows]
    stream: NDArray[np.int32]
    """Test documents joined by blank lines, without special tokens [M]."""


def build_tokens(settings: Settings, tokenizer: Tokenizer, author: Author | None = None) -> Tokens:
    """Read all sources and pack them.

    Rows of different sources are mixed. The caps on val and test rows are shared equally by the
    sources that have any; the cap on train rows is each source's own.

    Args:
        author: the teacher, for sources `self`; needed only where there is one.

    Raises:
        InputError: a source cannot be read, or a split stays empty.
    """
    test_titles: set[str] = set()
    readings: list[_Reading] = []
    for number, source in enumerate(settings.test):
        items = list(itertools.islice(read_source(source, settings.seed + number), _TEST_ITEMS))
        test_titles.update(canonical(item.title) for item in items)
        readings.append(_Reading(settings, tokenizer, source, iter(items), None))
    for number, source in enumerate(settings.train, start=len(settings.test)):
        seed = settings.seed + number
        if source.source == OWN_TEXT:
            assert author is not None
            readings.append(_Writing(settings, tokenizer, source, author, seed))
            continue
        items_of = read_source(source, seed)
        readings.append(_Reading(settings, tokenizer, source, items_of, test_titles))
    # one bar at a time: writing shows its own
    written = [reading for reading in readings if isinstance(reading, _Writing)]
    read = [reading for reading in readings if reading not in written]
    label = "reading text sources"
    for reading in itertools.chain(track(read, len(read), label) if read else (), written):
        reading.run()
    splits = {split: _merge(split, readings, settings) for split in SPLITS}
    return Tokens(splits, _stream(readings, settings, tokenizer))


_TEST_ITEMS = 20_000  # documents of a test source that are looked at (a streamed one has no end)


class _Reading:
    """One source on its way into the packers of the three splits.

    Args:
        test_titles: titles that belong to the test split; None: every document does.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        source: Source,
        items: Iterator[Document | Instruction],
        test_titles: set[str] | None,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._source = source
        self._items = items
        self._test_titles = test_titles
        limits: dict[Split, int | None] = {
            "train": source.sequences if test_titles is not None else 0,
            "val": settings.val_sequences if test_titles is not None else 0,
            "test": settings.test_sequences,
        }
        pad_id = pad_id_of(tokenizer)
        self.packers = {
            split: Packer(settings.max_length, pad_id, packing=settings.packing, limit=limit)
            for split, limit in limits.items()
        }
        self.stream: list[str] = []
        self._stream_room = STREAM_CHARACTERS

    @property
    def stream_rank(self) -> tuple[bool, bool, bool]:
        """What people wrote, then prose before instructions, then test sources before train
        sources: lowest first."""
        own = self._source.source == OWN_TEXT
        return own, self._source.format != "text", self._test_titles is not None

    def run(self) -> None:
        """Read until the source ends or nothing more is wanted of it."""
        while batch := list(itertools.islice(self._items, _BATCH)):
            texts: dict[Split, list[Rendered]] = {split: [] for split in SPLITS}
            for item in batch:
                self._sort(item, texts)
            for split, packer in self.packers.items():
                if texts[split] and not packer.full:
                    packer.add(self._encode(texts[split]))
            if self._stream_room <= 0 and all(p.full for p in self.packers.values()):
                return

    def _sort(self, item: Document | Instruction, texts: dict[Split, list[Rendered]]) -> None:
        split = self._split(item)
        if self.packers[split].full and (split != "test" or self._stream_room <= 0):
            return
        for text, prompt in render(self._tokenizer, item, self._source):
            kept = text if split == "train" else beginning(text, HELD_OUT_CHARACTERS)
            texts[split].append(Rendered(kept, min(prompt, len(kept))))
            if split == "test" and self._stream_room > 0:
                self.stream.append(kept)
                self._stream_room -= len(kept)

    def _split(self, item: Document | Instruction) -> Split:
        if self._test_titles is None or canonical(item.title) in self._test_titles:
            return "test"
        settings = self._settings
        return split_of(item.title, settings.val_fraction, settings.test_fraction)

    def _encode(self, texts: list[Rendered]) -> Iterator[Encoded]:
        """Token lists. A chat text writes its special tokens out; others end with the end token."""
        chat = self._source.format == "alpaca_chat"
        encoded = self._tokens([item.text for item in texts], special=not chat)
        prompts = self._tokens([item.text[: item.prompt] for item in texts], special=not chat)
        end = self._tokenizer.eos_token_id
        for tokens, prompt in zip(encoded, prompts, strict=True):
            # a token across the border is the answer's
            shared = sum(1 for _ in itertools.takewhile(_equal, zip(tokens, prompt, strict=False)))
            closed = chat or end is None or (tokens and tokens[-1] == end)
            yield Encoded(tokens if closed else [*tokens, end], shared if prompt else 0)

    def _tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
        return [tokens if text else [] for text, tokens in zip(texts, found, strict=True)]


class _Writing(_Reading):
    """The same for what the teacher writes: each sequence is a document, its tokens as they are.

    Text is not tokenized again: that could give other tokens than the ones which were drawn.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        source: Source,
        author: Author,
        seed: int,
    ) -> None:
        super().__init__(settings, tokenizer, source, iter(()), set())
        self._author = author
        self._seed = seed

    def run(self) -> None:
        """Ask for sequences until the train rows are complete; a repeated one counts once.

        Raises:
            InputError: the teacher only repeats itself.
        """
        limit, settings = self._source.sequences, self._settings
        assert limit is not None
        share = 1 - settings.val_fraction - settings.test_fraction
        seen: set[tuple[int, ...]] = set()
        asked = trained = 0
        while trained < limit:
            count = max(_SMALLEST_ROUND, math.ceil((limit - trained) / share))
            before = len(seen)
            for tokens in self._author(asked, count, settings.max_length, self._seed):
                if (sequence := tuple(tokens)) not in seen:
                    seen.add(sequence)
                    trained += self._place(tokens)
            asked += count
            if len(seen) == before:
                raise InputError(
                    f"the teacher writes the same text again and again: {before} different ones "
                    f"among {asked} sequences; ask for fewer, or give tokens.train other text"
                )

    def _place(self, tokens: list[int]) -> bool:
        """Give a sequence to its split; whether that is train."""
        title = " ".join(map(str, tokens))
        split = split_of(title, self._settings.val_fraction, self._settings.test_fraction)
        if not self.packers[split].full:
            self.packers[split].add([Encoded(tokens)])
        if split == "test" and self._stream_room > 0:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            assert isinstance(text, str)
            self.stream.append(text)
            self._stream_room -= len(text)
        return split == "train"


def _equal(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]


def beginning(text: str, characters: int) -> str:
    """The first ``characters`` of a text, cut at a word's end."""
    if len(text) <= characters:
        return text
    cut = text[: characters + 1]
    words = cut.rsplit(maxsplit=1)
    return words[0] if len(words) == 2 else cut[:characters]


def pad_id_of(tokenizer: Tokenizer) -> int:
    """The id that fills short rows (it is masked everywhere, so any would do)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _merge(split: Split, readings: list[_Reading], settings: Settings) -> Rows:
    """The rows of all sources in a seeded order, up to the split's cap."""
    parts = [part for reading in readings if len(part := reading.packers[split].rows())]
    if not parts:
        raise InputError(f"the {split} split has no rows; {_REMEDY[split]}")
    generator = np.random.default_rng((settings.seed, SPLITS.index(split)))
    caps = {"train": None, "val": settings.val_sequences, "test": settings.test_sequences}
    shares = equal_shares([len(part) for part in parts], caps[split])
    rows = Rows.join([part[:share] for part, share in zip(parts, shares, strict=True)])
    return rows[generator.permutation(len(rows))]


_REMEDY = {
    "train": "give tokens.train more text, or lower tokens.val_fraction and tokens.test_fraction",
    "val": "give tokens.train more text or raise tokens.val_fraction",
    "test": "give tokens.test a source, or raise tokens.test_fraction",
}


def equal_shares(available: list[int], cap: int | None) -> list[int]:
    """How many each of several gives, when together they may give ``cap`` (None: everything).

    All give the same, except that who has less gives all; the first ones give one more where the
    cap does not divide.
    """
    if cap is None or sum(available) <= cap:
        return list(available)
    shares = [0] * len(available)
    while (left := cap - sum(shares)) > 0:
        willing = [i for i, have in enumerate(available) if have > shares[i]]
        for i in willing[:left]:
            shares[i] += min(max(left // len(willing), 1), available[i] - shares[i])
    return shares


def _stream(
    readings: list[_Reading], settings: Settings, tokenizer: Tokenizer
) -> NDArray[np.int32]:
    """Perplexity text: that of the sources which serve best, see ``stream_rank``."""
    best = min(reading.stream_rank for reading in readings if reading.stream)
    chosen = [reading for reading in readings if reading.stream_rank == best]
    texts = [text for reading in chosen for text in reading.stream]
    generator = np.random.default_rng((settings.seed, len(SPLITS)))
    joined = "\n\n".join(texts[index] for index in generator.permutation(len(texts)))
    tokens = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(tokens, dtype=np.int32)
