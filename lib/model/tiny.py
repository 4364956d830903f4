"""Two-layer teachers made on the spot, for tests and the tiny profile."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lib.base.errors import InputError

VOCABULARY = 288  # a few more than the tokenizer has, as the embeddings of real models do
_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_WEIGHT_STD = 0.1
_EMBEDDING_STD = 0.3  # logits of standard deviation 2 to 3: peaked enough to distil from

# ChatML with a switch for the thinking mode, which only the generation prompt shows.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)


def random_teacher(kind: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A ``llama`` or ``qwen3`` model (hidden 64, MLP 160) and a byte-level tokenizer.

    Raises:
        InputError: unknown kind.
    """
    tokenizer = byte_tokenizer()
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    else:
        raise InputError(f"teacher.source random:{kind} is unknown; use random:llama, random:qwen3")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                wide = "embed" in name or "lm_head" in name
                std = _EMBEDDING_STD if wide else _WEIGHT_STD
                parameter.normal_(0.0, std, generator=generator)
    return model, tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, after the three special tokens; with a chat template."""
    special = [_END_OF_TEXT, _TURN_START, _TURN_END]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_END_OF_TEXT,
        eos_token=_TURN_END,
        additional_special_tokens=[_TURN_START],
        chat_template=_CHAT_TEMPLATE,
    )
