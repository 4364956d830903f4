"""A snapped model as a static graph with a key/value cache: what the packages are made from.

Only float and int32 tensors of fixed shapes go in and out, so the graph has no data-dependent
operation: mask, positions and cache slots are inputs. With S tokens per call and T cache slots:

    ids        int32 [S]            token ids
    positions  int32 [S]            their positions
    mask       float (1, 1, S, T)   0 where a token may look at a slot, :data:`MASK_VALUE` elsewhere
    write      float (1, 1, S, T)   1 where a token is stored in a slot, 0 elsewhere
    keys, values  float (L, K, D, T)  the cache

and logits (1, V', 1, S) of each slice of the vocabulary and the new cache out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import InputError
from lib.export.layers import (
    Attention,
    ChannelNorm,
    FactoredConv,
    Mlp,
    SlicedEmbedding,
    Step,
)
from lib.model.norms import rms_gain
from lib.model.rescale import is_tied
from lib.quant.fp16 import MASK_VALUE, round_to_fp16

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one call takes besides the cache; shapes in the module's docstring."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    write: Tensor

    def named(self) -> dict[str, Tensor]:
        """The inputs by the names they have in a package."""
        return {name: getattr(self, name) for name in ("ids", "positions", "mask", "write")}


def step_inputs(ids: list[int], start: int, tokens: int, slots: int) -> Inputs:
    """Inputs for ``ids`` at positions ``start``, ``start`` + 1, ..., padded to ``tokens``.

    Padding is stored nowhere and sees the slot of the last real token, so that no row of scores
    is empty.

    Raises:
        InputError: no ids, more ids than ``tokens``, or positions beyond the cache.
    """
    if not 1 <= len(ids) <= tokens:
        raise InputError(f"{len(ids)} tokens do not fit a graph for {tokens} at a time")
    if start + len(ids) > slots:
        raise InputError(f"position {start + len(ids) - 1} is beyond a cache of {slots} slots")
    real = len(ids)
    positions = torch.arange(start, start + tokens).clamp_max(start + real - 1)
    slot = torch.arange(slots)
    write = (slot == positions[:, None]).float()
    write[real:] = 0
    return Inputs(
        ids=torch.tensor(ids + [0] * (tokens - real), dtype=torch.int32),
        positions=positions.int(),
        mask=((slot > positions[:, None]).float() * MASK_VALUE)[None, None],
        write=write[None, None],
    )


def join_logits(outputs: Mapping[str, Tensor]) -> Tensor:
    """``logits_0``, ``logits_1``, ... ``(1, V', 1, S)``, in any order -> float32 ``[S, V]``."""
    names = [name for name in outputs if name.startswith("logits_")]
    names.sort(key=lambda name: int(name.removeprefix("logits_")))
    return torch.cat([outputs[name] for name in names], dim=1)[0, :, 0].T.float()


def cache_of(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The cache for the next call, from the results of one without state."""
    return {name: outputs[f"new_{name}"] for name in ("keys", "values")}


class Block(nn.Module):
    """One decoder block: attention and MLP, each behind its norm, each added to the residual."""

    def __init__(self, module: nn.Module, heads: tuple[int, int], name: str) -> None:
        super().__init__()
        attention = module.get_submodule("self_attn")
        present = {n for n, _ in attention.named_children()} & {"q_norm", "k_norm"}
        norms = {n: _gain(attention.get_submodule(n), f"{name}.self_attn.{n}") for n in present}
        self.attention = Attention(attention, norms, heads)
        self.mlp = Mlp(module.get_submodule("mlp"))
        for own, theirs in (("first", "input_layernorm"), ("second", "post_attention_layernorm")):
            gain, eps = _gain(module.get_submodule(theirs), f"{name}.{theirs}")
            self.add_module(f"{own}_norm", ChannelNorm(gain, eps, dim=1))

    def forward(
        self, x: Tensor, step: Step, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See :meth:`lib.export.layers.Attention.forward`."""
        mixed, cache = self.attention(self.get_submodule("first_norm")(x), step, cache)
        x = x + mixed
        return x + self.mlp(self.get_submodule("second_norm")(x)), cache


class DeployedDecoder(nn.Module):
    """A snapped (or baked) Llama, Qwen2 or Qwen3 model as a static graph.

    Args:
        model: as :func:`lib.model.checkpoint.load_checkpoint` gives it; not changed.
        slots: T, the longest text that the cache holds.

    Raises:
        InputError: another family, or a feature of it that the graph does not have.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        super().__init__()
        check_family(model, slots)
        config: Any = model.config
        base: Any = model.base_model
        heads = (int(config.num_attention_heads), int(config.num_key_value_heads))
        self.slots = slots
        self.group = heads[0] // heads[1]
        self.embedding = SlicedEmbedding(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(
            Block(block, heads, f"model.layers.{number}")
            for number, block in enumerate(base.layers)
        )
        self.norm = ChannelNorm(*_gain(base.norm, "model.norm"), dim=1)
        if is_tied(model):
            self.head = self.embedding.slices
        else:
            head: Any = model.get_output_embeddings()
            self.head = SlicedEmbedding(head.weight).slices
        positions = torch.arange(slots)[None]
        with torch.no_grad():
            tables = base.rotary_emb(torch.zeros(1), positions)  # cos and sin [1, T, D]
        self.register_buffer("cosines", round_to_fp16(tables[0][0].float()))
        self.register_buffer("sines", round_to_fp16(tables[1][0].float()))
        self.cache_shape = (len(self.blocks), heads[1], self.cosines.shape[1], slots)
        self.eval()

    cosines: Tensor
    sines: Tensor

    def _table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (t.index_select(0, positions).T[None, None] for t in (self.cosines, self.sines))
        return cos, sin

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        write: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, ...]:
        """(logits of each slice..., keys, values); the module's docstring gives the shapes."""
        x = self.embedding(ids)
        cosines, sines = self._table(positions)
        step = Step(
            cosines=cosines,
            sines=sines,
            mask=torch.cat([mask] * self.group, dim=2),
            write=write,
            keep=1 - write.sum(2, keepdim=True),
        )
        new_keys, new_values = [], []
        for number, block in enumerate(self.blocks):
            cache = (keys[number : number + 1], values[number : number + 1])
            x, cache = block(x, step, cache)
            new_keys.append(cache[0])
            new_values.append(cache[1])
        x = self.norm(x)
        logits = [nn.functional.conv2d(x, part) for part in self.head]
        return (*logits, torch.cat(new_keys), torch.cat(new_values))

    def empty_cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values of no tokens."""
        return torch.zeros(self.cache_shape), torch.zeros(self.cache_shape)

    def cache_inputs(self) -> dict[str, Tensor]:
        """The empty cache, by the names it has in a package."""
        return dict(zip(("keys", "values"), self.empty_cache(), strict=True))

    def layers(self) -> dict[str, FactoredConv]:
        """The quantized layers, by their names in the Hugging Face model."""
        found = {}
        for path, module in self.named_modules():
            if isinstance(module, FactoredConv):
                _, number, part, name = path.split(".")
                found[layer_name(int(number), part, name)] = module
        return found


def layer_name(block: int, part: str, short: str) -> str:
    """Name of a projection in the Hugging Face model."""
    parent = "self_attn" if part == "attention" else "mlp"
    return f"model.layers.{block}.{parent}.{short}_proj"


def check_family(model: PreTrainedModel, slots: int) -> None:
    """Refuse what the graph does not compute, rather than export something else.

    Raises:
        InputError: names the setting.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{type(model).__name__} cannot be exported as a package; only {', '.join(FAMILIES)} "
            "can (the Hugging Face folder works for any model)"
        )
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act {config.hidden_act} cannot be exported; only silu can")
    if getattr(config, "use_sliding_window", False):
        raise InputError(
            "sliding-window attention cannot be exported; set use_sliding_window false"
        )
    longest = int(config.max_position_embeddings)
    if slots > longest:
        raise InputError(f"export.context {slots} is beyond the model's {longest} positions")
    kind = str((config.rope_parameters or {}).get("rope_type"))
    if kind in ("dynamic", "longrope"):
        raise InputError(f"{kind} rotary scaling cannot be exported: its tables are not constants")


def _gain(module: nn.Module, name: str) -> tuple[Tensor, float]:
    found = rms_gain(module)
    if found is None:
        raise InputError(f"{name} is no RMSNorm; the graph has no other norm")
    return found
