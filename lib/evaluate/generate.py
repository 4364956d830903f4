"""Generation of text: one way for samples, the command line and the Python API."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lib.base.errors import InputError
from lib.model.surgery import bake, quantized_layers, replace_module

Message = dict[str, str]
"""``{"role": "user" | "assistant" | "system", "content": ...}``"""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """A conversation in the chat template, up to where the answer begins; thinking is off.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template; use `generate --raw`")
    text = tokenizer.apply_chat_template(
        cast(Any, messages), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert isinstance(text, str)
    return text


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as a user's turn of the chat template; unchanged where there is none."""
    if tokenizer.chat_template is None:
        return prompt
    return render_chat(tokenizer, [{"role": "user", "content": prompt}])


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of :func:`as_chat`; the template writes its special tokens out."""
    return list(tokenizer(as_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"])


@contextlib.contextmanager
def baked(model: PreTrainedModel) -> Iterator[None]:
    """Plain layers in place of the quantized ones while the block runs: W_q is made once, not
    once per token."""
    layers = quantized_layers(model)
    bake(model)
    try:
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    new_tokens: int,
    *,
    seed: int,
    temperature: float,
    streamer: TextStreamer | None = None,
) -> Tensor:
    """At most ``new_tokens`` new ids per row: long ``[rows, up to new_tokens]``, padded.

    Args:
        rows: token ids of the prompts, of any lengths, run as one batch.
        temperature: 0 takes the most probable token each time; above, tokens are drawn from the
            whole distribution with ``seed``. The global generator is left as it was.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(len(ids) for ids in rows)
    # Left padding: every row's next token then stands at the same place.
    ids = torch.tensor([[pad or 0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    sampling: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    model.eval()
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        output = cast(Any, model).generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            pad_token_id=pad or 0,
            eos_token_id=_stop_ids(model, tokenizer) or None,
            use_cache=True,
            do_sample=temperature > 0,
            streamer=streamer,
            **sampling,
        )
    return cast(Tensor, output)[:, longest:]


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, by the model's word or the tokenizer's."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({i for i in [*found, tokenizer.eos_token_id] if isinstance(i, int)})


class _Pieces(TextStreamer):
    """Hands each piece of text on as soon as its words are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._emit(text)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    new_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    emit: Callable[[str], None] = lambda piece: None,
) -> str:
    """The answer to one prompt of token ids; ``emit`` gets it piece by piece.

    Raises:
        InputError: no prompt, or prompt and answer exceed the model's context.
    """
    check_room(model, len(ids), new_tokens)
    pieces: list[str] = []

    def collect(piece: str) -> None:
        pieces.append(piece)
        emit(piece)

    generate_tokens(
        model,
        tokenizer,
        [ids],
        new_tokens,
        seed=seed,
        temperature=temperature,
        streamer=_Pieces(tokenizer, collect),
    )
    return "".join(pieces)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that prompt and answer may have together, None where the model does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def check_room(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Check that a prompt is not empty and leaves room for the answer.

    Raises:
        InputError: otherwise.
    """
    if not prompt_tokens:
        raise InputError("the prompt is empty; give some text")
    context = context_length(model)
    if context is not None and prompt_tokens + new_tokens > context:
        raise InputError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones exceed the model's "
            f"context of {context}; shorten the prompt or ask for fewer tokens"
        )
