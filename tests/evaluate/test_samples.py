"""Batched generation against one prompt at a time."""

from __future__ import annotations

import torch

from lib.evaluate.generate import as_chat
from lib.evaluate.samples import generate_texts
from lib.model.tiny import random_teacher

PROMPTS = ["What is 2+2?", "A much longer prompt, so that the shorter ones are padded.", "Hi"]


def test_batch_equals_plain_greedy_loop() -> None:
    model, tokenizer = random_teacher("llama", seed=0)
    texts = generate_texts(model, tokenizer, PROMPTS, 6)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(as_chat(tokenizer, prompt))["input_ids"]
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_prompt_goes_through_the_chat_template() -> None:
    _, tokenizer = random_teacher("llama", seed=0)
    text = as_chat(tokenizer, "Hi")
    assert text.startswith("<|im_start|>user\nHi<|im_end|>")
    assert "<think>\n\n</think>" in text  # thinking is switched off
    tokenizer.chat_template = None
    assert as_chat(tokenizer, "Hi") == "Hi"


def test_sampling_is_seeded_and_leaves_the_global_generator_alone() -> None:
    model, tokenizer = random_teacher("llama", seed=0)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, again, other = (
        generate_texts(model, tokenizer, PROMPTS, 12, seed=seed, temperature=1.0)
        for seed in (0, 0, 1)
    )
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_prompts() -> None:
    model, tokenizer = random_teacher("llama", seed=0)
    assert generate_texts(model, tokenizer, [], 4) == []
