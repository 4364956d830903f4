"""A decoder cut into its blocks: parts of a model that run on hidden states, and a teacher of
which only one block at a time is in memory.

Shapes: hidden states ``[B, L, D]``, right-padded sequences, no key/value cache.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lib.base.errors import CorruptError, InputError
from lib.base.files import read_json
from lib.model.surgery import master_linear, quantized_layers, replace_module


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, in order.

    Raises:
        InputError: the decoder does not keep them as ``layers``.
    """
    decoder = model.base_model if isinstance(model, PreTrainedModel) else model
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(
            f"{type(decoder).__name__} has no list of decoder blocks named layers; "
            "use a decoder of the Llama or Qwen family"
        )
    return blocks


def block_prefix(model: PreTrainedModel, number: int) -> str:
    """What the names of everything inside a block start with: ``model.layers.3.``"""
    return f"{model.base_model_prefix}.layers.{number}."


def part(model: PreTrainedModel, start: int, stop: int | None, *, norm: bool) -> PreTrainedModel:
    """Blocks ``start`` to ``stop`` (without it; None = the last) as a model of their own, called
    with ``inputs_embeds``. It holds the same modules, not copies.

    Args:
        norm: apply the decoder's last norm to the result.
    """
    blocks = list(decoder_blocks(model))[start:stop]
    decoder = cast(PreTrainedModel, model.base_model)
    view: PreTrainedModel = copy.copy(decoder)
    view._modules = dict(decoder._modules)
    view.layers = nn.ModuleList(blocks)
    view.embed_tokens = nn.Identity()  # or moving the part to a device would move it along
    if not norm:
        view.norm = nn.Identity()
    view.config = copy.copy(decoder.config)
    view.config.num_hidden_layers = len(blocks)
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is not None:
        view.config.layer_types = kinds[start:stop]
    return view


def run_part(view: nn.Module, hidden: Tensor) -> Tensor:
    """``[B, L, D]`` -> ``[B, L, D]`` through what :func:`part` gave."""
    return cast(Tensor, view(inputs_embeds=hidden, use_cache=False).last_hidden_state)


def master_block(model: PreTrainedModel, number: int) -> nn.Module:
    """A copy of one block, as a part of its own, that computes with the master weights of its
    quantized layers.

    Raises:
        MismatchError: a layer has none.
    """
    blocks = decoder_blocks(model)
    own = blocks[number]
    blocks[number] = copy.deepcopy(own)
    try:
        for name, layer in quantized_layers(blocks[number]).items():
            replace_module(blocks[number], name, master_linear(layer))
        return part(model, number, number + 1, norm=False)
    finally:
        blocks[number] = own


class BlockLoader:
    """A full-precision model on disk, read one block at a time; float32, on the CPU.

    Args:
        folder: a Hugging Face folder with safetensors, as the stage `teacher` writes it.

    Raises:
        CorruptError: the folder lacks a file or tensor; it is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.float32
            )
        self.model.eval()
        self._files = self._index()

    def _index(self) -> dict[str, str]:
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            return dict(read_json(index)["weight_map"])
        single = self.folder / SAFE_WEIGHTS_NAME
        if not single.is_file():
            raise CorruptError(f"{single} is missing; rerun the stage that makes {self.folder}")
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)

    def _load(self, module: nn.Module, prefix: str) -> None:
        wanted = dict(module.named_parameters())
        for name in wanted:
            if prefix + name not in self._files:
                raise CorruptError(f"{self.folder} holds no tensor {prefix}{name}; rerun its stage")
        with contextlib.ExitStack() as stack:
            opened = {
                file: stack.enter_context(safe_open(self.folder / file, framework="pt"))
                for file in {self._files[prefix + name] for name in wanted}
            }
            found = {n: opened[self._files[prefix + n]].get_tensor(prefix + n) for n in wanted}
        for name, empty in wanted.items():
            key, value = prefix + name, found[name].float()
            if value.shape != empty.shape:
                raise CorruptError(
                    f"{key} in {self.folder} has shape {list(value.shape)}, the model's is "
                    f"{list(empty.shape)}; rerun its stage"
                )
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))

    def block(self, number: int) -> nn.Module:
        """One block as a part of its own; nothing but the caller keeps it in memory."""
        blocks = decoder_blocks(self.model)
        empty = blocks[number]
        blocks[number] = copy.deepcopy(empty)
        self._load(blocks[number], block_prefix(self.model, number))
        view = part(self.model, number, number + 1, norm=False)
        blocks[number] = empty
        return view

    def embeddings(self) -> nn.Module:
        """The input embeddings: token ids ``[B, L]`` -> ``[B, L, D]``."""
        embeddings = copy.deepcopy(self.model.get_input_embeddings())
        self._load(embeddings, f"{self.model.base_model_prefix}.embed_tokens.")
        return embeddings
