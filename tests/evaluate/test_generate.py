"""Streaming, conversations and limits of generation."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lib.base.errors import InputError
from lib.evaluate.generate import baked, chat_ids, render_chat, stream_text
from lib.evaluate.samples import generate_texts
from lib.model.surgery import quantize_model, quantized_layers
from lib.model.tiny import random_teacher
from tests.tiny_models import model_spec


def test_streamed_pieces_are_the_batch_answer() -> None:
    model, tokenizer = random_teacher("llama", seed=0)
    for temperature in (0.0, 0.8):
        pieces: list[str] = []
        text = stream_text(
            model,
            tokenizer,
            chat_ids(tokenizer, "Hi"),
            200,
            seed=3,
            temperature=temperature,
            emit=pieces.append,
        )
        expected = generate_texts(model, tokenizer, ["Hi"], 200, seed=3, temperature=temperature)
        assert "".join(pieces) == text == expected[0]
    assert len(pieces) > 1


def test_a_conversation_in_the_template() -> None:
    _, tokenizer = random_teacher("llama", seed=0)
    messages = [{"role": r, "content": c} for r, c in (("user", "A"), ("assistant", "B"))]
    text = render_chat(tokenizer, [*messages, {"role": "user", "content": "C"}])
    assert [text.index(part) for part in "ABC"] == sorted(text.index(part) for part in "ABC")
    assert text.endswith("<think>\n\n</think>\n\n")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render_chat(tokenizer, messages)


def test_empty_and_long_prompts() -> None:
    model, tokenizer = random_teacher("llama", seed=0)
    with pytest.raises(InputError, match="empty"):
        stream_text(model, tokenizer, [], 1)
    context = model.config.max_position_embeddings
    with pytest.raises(InputError, match=f"context of {context}"):
        stream_text(model, tokenizer, [5] * (context - 3), 4)


def test_baked_for_the_block_only() -> None:
    model, _ = random_teacher("llama", seed=0)
    quantize_model(model, model_spec())
    layers = quantized_layers(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with contextlib.suppress(KeyError), baked(model):
            assert not quantized_layers(model)
            assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
            raise KeyError
    assert quantized_layers(model) == layers
