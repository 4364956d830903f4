from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from lib.base.errors import InputError
from lib.model.tiny import byte_tokenizer
from lib.text.chat import alpaca_text, chat_text, render
from lib.text.documents import Document, Instruction
from tests.text.sources import AnySource

ITEM = Instruction("Sort them.", "b, a", "a, b")
CHAT = AnySource("path:x.json", format="alpaca_chat")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_alpaca_with_input() -> None:
    text, prompt = alpaca_text(ITEM)
    assert text[prompt:] == "a, b"
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort them.\n\n### Input:\nb, a\n\n### Response:\na, b"
    )


def test_alpaca_without_input() -> None:
    text, prompt = alpaca_text(Instruction("Greet.", " ", "Hello."))
    assert text[prompt:] == "Hello."
    assert text == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\nHello."
    )


def test_chat_shows_the_thinking_switch(tokenizer: PreTrainedTokenizerFast) -> None:
    head = "<|im_start|>user\nSort them.\n\nb, a<|im_end|>\n<|im_start|>assistant\n"
    assert chat_text(tokenizer, ITEM, True).text == head + "a, b<|im_end|>\n"
    off, prompt = chat_text(tokenizer, ITEM, False)
    assert off == head + "<think>\n\n</think>\n\na, b<|im_end|>\n"
    assert off[prompt:] == "a, b<|im_end|>\n"


def test_chat_begins_as_generation_does(tokenizer: PreTrainedTokenizerFast) -> None:
    user = [{"role": "user", "content": "Sort them.\n\nb, a"}]
    for thinking in (False, True):
        prompt = tokenizer.apply_chat_template(
            user, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        text, length = chat_text(tokenizer, ITEM, thinking)
        assert text[:length] == prompt


def test_both_renders_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    both = AnySource("path:x.json", format="alpaca_chat", enable_thinking="both")
    texts = list(render(tokenizer, ITEM, both))
    assert texts == [chat_text(tokenizer, ITEM, False), chat_text(tokenizer, ITEM, True)]
    assert list(render(tokenizer, ITEM, CHAT)) == texts[:1]
    assert list(render(tokenizer, Document("t", "x"), CHAT)) == [("x", 0)]


def test_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        chat_text(tokenizer, ITEM, False)


def test_a_template_that_hides_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="does not show"):
        chat_text(tokenizer, ITEM, False)
