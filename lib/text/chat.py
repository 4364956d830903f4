"""Instructions as text: the Stanford Alpaca prompt, or the teacher's own chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from lib.base.errors import InputError
from lib.text.documents import Document, Instruction, Source

_ALPACA_HEAD = "Below is an instruction that describes a task"
_ALPACA_TASK = "Write a response that appropriately completes the request."

_MARK = "lutqat-answer"  # stands for the answer while the template's end of a turn is looked up


class Rendered(NamedTuple):
    """A text, and how many of its first characters are the prompt of what follows."""

    text: str
    prompt: int = 0


def alpaca_text(item: Instruction) -> Rendered:
    """Prompt and answer in the format of Stanford Alpaca (Taori et al. 2023)."""
    if item.input.strip():
        head = f"{_ALPACA_HEAD}, paired with an input that provides further context. {_ALPACA_TASK}"
        middle = f"### Instruction:\n{item.instruction}\n\n### Input:\n{item.input}"
    else:
        head = f"{_ALPACA_HEAD}. {_ALPACA_TASK}"
        middle = f"### Instruction:\n{item.instruction}"
    prompt = f"{head}\n\n{middle}\n\n### Response:\n"
    return Rendered(prompt + item.output, len(prompt))


def chat_text(tokenizer: Tokenizer, item: Instruction, enable_thinking: bool) -> Rendered:
    """Prompt and answer in the tokenizer's chat template, special tokens written out.

    The prompt is what generation would see (so a template's thinking switch shows, with its empty
    thinking block when it is off), then comes the answer and what the template ends a turn with.

    Raises:
        InputError: the tokenizer has no usable chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the teacher's tokenizer has no chat template, which alpaca_chat needs; "
            "set the format of this source to alpaca or choose an instruction-tuned teacher"
        )
    question = item.instruction + (f"\n\n{item.input}" if item.input.strip() else "")
    user = {"role": "user", "content": question}
    prompt = _render(tokenizer, [user], True, enable_thinking)
    whole = _render(tokenizer, [user, {"role": "assistant", "content": _MARK}], False, False)
    _, found, end = whole.rpartition(_MARK)
    if not found:
        raise InputError("the teacher's chat template does not show the assistant's answer")
    return Rendered(prompt + item.output + end, len(prompt))


def render(
    tokenizer: Tokenizer, item: Document | Instruction, source: Source
) -> Iterator[Rendered]:
    """The text of a document (one) or of an instruction (two if ``enable_thinking`` is both)."""
    if isinstance(item, Document):
        yield Rendered(item.text)
    elif source.format == "alpaca":
        yield alpaca_text(item)
    else:
        modes = (False, True) if source.enable_thinking == "both" else (source.enable_thinking,)
        for mode in modes:
            yield chat_text(tokenizer, item, mode)


def _render(
    tokenizer: Tokenizer, messages: list[dict[str, str]], prompt: bool, thinking: bool
) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking
    )
    if not isinstance(text, str):
        raise InputError("the teacher's chat template does not give text")
    return text
