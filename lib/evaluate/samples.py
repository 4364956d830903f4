"""Answers to a few prompts."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as a user's turn of the chat template; unchanged where there is none."""
    if tokenizer.chat_template is None:
        return prompt
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert isinstance(text, str)
    return text


@torch.no_grad()
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
    model.eval()
    encoded = [
        tokenizer(as_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"]
        for prompt in prompts
    ]
    longest = max(len(ids) for ids in encoded)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Left padding: every row's next token then stands at the same place.
    rows = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = cast(Any, model).generate(
            input_ids=rows.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            use_cache=True,
            **({"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | sampling),
        )
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in output]
