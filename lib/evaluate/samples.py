"""Answers to a few prompts."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.evaluate.generate import chat_ids, generate_tokens


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    new_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 0.0,
) -> list[str]:
    """At most ``new_tokens`` new tokens per prompt, without the prompt; all prompts in one batch.

    Args:
        temperature: 0 takes the most probable token each time; above, tokens are drawn, seeded.
    """
    if not prompts:
        return []
    rows = [chat_ids(tokenizer, prompt) for prompt in prompts]
    output = generate_tokens(model, tokenizer, rows, new_tokens, seed=seed, temperature=temperature)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in output]
