from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lib.base.errors import InputError
from lib.model.tiny import byte_tokenizer
from lib.text import build
from lib.text.build import Tokens, beginning, build_tokens, equal_shares, pad_id_of
from lib.text.documents import Document, Instruction, Source
from lib.text.split import split_of
from tests.text.sources import INSTRUCTIONS, PROSE, AnySettings, AnySource

TEXT = AnySource(f"path:{PROSE}")
CHAT = AnySource(f"path:{INSTRUCTIONS}", format="alpaca_chat")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def text_of(tokens: Tokens, split: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    rows = tokens.splits[split]  # type: ignore[index]
    pairs = zip(rows.input_ids, rows.lengths, strict=True)
    return [tokenizer.decode(row[:length]) for row, length in pairs]


def test_no_token_of_one_split_is_in_another(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = AnySettings((TEXT,), max_length=4000, packing=False)
    tokens = build_tokens(settings, tokenizer)
    found = {split: set(text_of(tokens, split, tokenizer)) for split in tokens.splits}
    assert sum(map(len, found.values())) == 42  # every paragraph, once
    for split, texts in found.items():
        for text in texts:
            title = text.removesuffix("<|im_end|>")
            assert split_of(title, settings.val_fraction, settings.test_fraction) == split


def test_titles_of_test_sources_are_not_trained_on(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same titles occur in a train source, with other texts."""
    titles = [f"Title {i}" for i in range(40)]

    def read(source: Source, seed: int) -> object:
        if source.source == "path:test.txt":
            return iter([Document(title, f"test of {title}.") for title in titles[:10]])
        return iter([Document(title.upper(), f"train of {title}.") for title in titles])

    monkeypatch.setattr(build, "read_source", read)
    train, test = AnySource("path:train.txt"), AnySource("path:test.txt")
    tokens = build_tokens(AnySettings((train,), (test,), packing=False), tokenizer)
    held_out = {f"of {title}.<|im_end|>" for title in titles[:10]}
    for split in ("train", "val"):
        for text in text_of(tokens, split, tokenizer):
            assert text.removeprefix("train ") not in held_out
    assert any(t.startswith("test") for t in text_of(tokens, "test", tokenizer))
    stream = tokenizer.decode(tokens.stream)
    assert "test of" in stream and "train of" not in stream


def test_the_test_source_gives_only_test_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = AnySettings((CHAT,), (TEXT,), test_fraction=0.0)
    tokens = build_tokens(settings, tokenizer)
    assert all("breakwater" not in text for text in text_of(tokens, "train", tokenizer))
    paragraphs = tokenizer.decode(tokens.stream).split("\n\n")
    assert len(paragraphs) == 42
    assert sorted(paragraphs) != paragraphs


def test_same_seed_same_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = AnySettings((TEXT, CHAT))
    first, again = build_tokens(settings, tokenizer), build_tokens(settings, tokenizer)
    other = build_tokens(dataclasses.replace(settings, seed=1), tokenizer)
    for split, rows in first.splits.items():
        assert (rows.input_ids == again.splits[split].input_ids).all()
        assert (rows.lengths == again.splits[split].lengths).all()
        assert not np.array_equal(rows.input_ids, other.splits[split].input_ids)
    assert (first.stream == again.stream).all()


def test_caps(tokenizer: PreTrainedTokenizerFast) -> None:
    sources = (dataclasses.replace(TEXT, sequences=7), dataclasses.replace(CHAT, sequences=5))
    settings = AnySettings(sources, val_sequences=6, test_sequences=4)
    tokens = build_tokens(settings, tokenizer)
    assert {split: len(rows.lengths) for split, rows in tokens.splits.items()} == {
        "train": 12,
        "val": 6,
        "test": 4,
    }
    chat = [text for text in text_of(tokens, "val", tokenizer) if "<|im_start|>" in text]
    assert 0 < len(chat) <= 3  # an equal share, of which some rows lie inside an answer


def test_thinking_both_is_twice_as_much(tokenizer: PreTrainedTokenizerFast) -> None:
    def count(mode: object) -> int:
        source = dataclasses.replace(CHAT, enable_thinking=mode)
        settings = AnySettings((source,), max_length=2000, packing=False)
        return len(build_tokens(settings, tokenizer).splits["train"].lengths)

    assert count("both") == 2 * count(False) == 2 * count(True)


def test_chat_special_tokens_are_single_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = AnySettings((CHAT,), max_length=2000, packing=False)
    rows = build_tokens(settings, tokenizer).splits["train"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ((rows.input_ids == start).sum(1) == 2).all()
    assert ((rows.input_ids == end).sum(1) == 2).all()
    assert pad_id_of(tokenizer) == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 1e-9}, "val split has no rows.*raise tokens.val_fraction"),
        ({"test_fraction": 0.0}, "test split has no rows.*tokens.test"),
        ({"val_fraction": 0.5, "test_fraction": 0.4999999}, "train split has no rows"),
    ],
)
def test_an_empty_split_is_an_error(
    tokenizer: PreTrainedTokenizerFast, change: dict[str, float], message: str
) -> None:
    settings = dataclasses.replace(AnySettings((TEXT,)), **change)
    with pytest.raises(InputError, match=message):
        build_tokens(settings, tokenizer)


def test_reading_stops_when_nothing_more_is_wanted(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endless (streamed) source ends with its caps."""
    given_out = 0

    def read(source: Source, seed: int) -> object:
        nonlocal given_out
        while True:
            given_out += 1
            yield Document(f"Title {given_out}", "word " * 400)

    monkeypatch.setattr(build, "read_source", read)
    settings = AnySettings((AnySource("hub:endless", streaming=True, sequences=30),))
    tokens = build_tokens(settings, tokenizer)
    assert len(tokens.splits["train"].lengths) == 30
    assert given_out < 2000


def test_instructions_alone_also_give_a_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = build_tokens(AnySettings((CHAT,)), tokenizer)
    assert "<|im_start|>user" in tokenizer.decode(tokens.stream)


@given(st.text(max_size=60), st.integers(1, 40))
def test_beginning(text: str, characters: int) -> None:
    cut = beginning(text, characters)
    assert text.startswith(cut) and len(cut) <= characters
    if len(text) <= characters:
        assert cut == text


def test_beginning_ends_with_a_word() -> None:
    assert beginning("one two three", 9) == "one two"
    assert beginning("one two three", 7) == "one"
    assert beginning("unbreakable", 4) == "unbr"


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.none() | st.integers(0, 60))
def test_equal_shares(available: list[int], cap: int | None) -> None:
    shares = equal_shares(available, cap)
    total = sum(available)
    assert sum(shares) == (total if cap is None else min(cap, total))
    assert all(0 <= share <= have for share, have in zip(shares, available, strict=True))
    short = [share for share, have in zip(shares, available, strict=True) if share < have]
    if short:
        assert max(shares) - min(short) <= 1


def test_an_instruction_and_its_input_are_the_title() -> None:
    assert Instruction("Sort.", "b, a", "a, b").title == "Sort.\nb, a"
    assert Instruction("Greet.", "", "Hello.").title == "Greet."


def test_prose_ends_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = AnySettings((TEXT,), max_length=4000, packing=False)
    rows = build_tokens(settings, tokenizer).splits["train"]
    ends = rows.input_ids == tokenizer.eos_token_id
    assert (ends.sum(1) == 1).all()
    assert (ends.argmax(1) == rows.lengths - 1).all()


def test_long_documents_are_cut_where_they_only_measure(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(source: Source, seed: int) -> object:
        return (Document(f"Title {i}", "word " * 1000) for i in range(30))

    monkeypatch.setattr(build, "read_source", read)
    settings = AnySettings((AnySource("path:x.txt"),), max_length=6000, packing=False)
    tokens = build_tokens(settings, tokenizer)
    whole, cut = 5 * 1000 + 1, build.HELD_OUT_CHARACTERS - 1 + 1  # a byte a token, end token
    assert set(tokens.splits["train"].lengths) == {whole}
    assert set(tokens.splits["val"].lengths) == set(tokens.splits["test"].lengths) == {cut}


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_are_marked(tokenizer: PreTrainedTokenizerFast, packing: bool) -> None:
    """What is not prompt reads as answers; plain documents have no prompt."""
    tokens = build_tokens(AnySettings((CHAT,), packing=packing, max_length=600), tokenizer)
    rows = tokens.splits["train"]
    answers = "".join(
        tokenizer.decode(ids[:length][~prompt[:length]])
        for ids, length, prompt in zip(rows.input_ids, rows.lengths, rows.prompt, strict=True)
    )
    assert rows.prompt.any() and "<|im_start|>" not in answers
    assert answers.count("<|im_end|>") > 3
    plain = build_tokens(AnySettings((TEXT,), packing=packing), tokenizer)
    assert not plain.splits["train"].prompt.any()


# --- text by the teacher ------------------------------------------------------------------------

OWN = AnySource("self", sequences=30)


def author(first: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Random tokens, of a seed of their own for each sequence."""
    numbers = range(first, first + count)
    return [np.random.default_rng([seed, n]).integers(3, 259, length).tolist() for n in numbers]


@pytest.mark.parametrize("packing", [False, True])
def test_sequences_of_the_teacher_go_in_as_they_are(
    tokenizer: PreTrainedTokenizerFast, packing: bool
) -> None:
    settings = AnySettings((TEXT, OWN), packing=packing)
    tokens = build_tokens(settings, tokenizer, author)
    among = {tuple(row) for row in author(0, 200, settings.max_length, settings.seed + 1)}
    found = {
        split: [row for row in map(tuple, rows.input_ids.tolist()) if row in among]
        for split, rows in tokens.splits.items()
    }
    assert len(found["train"]) == 30 and found["val"] and found["test"]
    assert len({row for rows in found.values() for row in rows}) == sum(map(len, found.values()))
    for split, rows in found.items():
        for row in rows:
            title = " ".join(map(str, row))
            assert split_of(title, settings.val_fraction, settings.test_fraction) == split
    assert not any(rows.prompt.any() for rows in tokens.splits.values())
    prose = tokenizer.decode(tokens.stream)
    alone = build_tokens(AnySettings((TEXT,), packing=packing), tokenizer)
    assert sorted(prose.split("\n\n")) == sorted(tokenizer.decode(alone.stream).split("\n\n"))


def test_the_teacher_alone_also_gives_a_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = build_tokens(AnySettings((OWN,)), tokenizer, author)
    assert len(tokens.splits["train"]) == 30 and len(tokens.stream)


def test_repeated_sequences_count_once(tokenizer: PreTrainedTokenizerFast) -> None:
    def twice(first: int, count: int, length: int, seed: int) -> list[list[int]]:
        return [author(n // 2, 1, length, seed)[0] for n in range(first, first + count)]

    rows = build_tokens(AnySettings((OWN,)), tokenizer, twice).splits["train"].input_ids
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 30


def test_a_teacher_that_only_repeats_itself_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    def same(first: int, count: int, length: int, seed: int) -> list[list[int]]:
        return author(0, 1, length, seed) * count

    with pytest.raises(InputError, match="again and again: 1 different ones among"):
        build_tokens(AnySettings((OWN,)), tokenizer, same)
