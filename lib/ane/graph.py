"""Facts about the graph: what is in it besides numbers, and whether its shapes fit the device.

Operations and ranks are those that ran under emulation; sides and channels are those of the
deployed layout (1, channels, height, tokens), computed from the model. How many tokens a call takes
is chosen when it is exported: what only the longest choice breaks is noted and does not fail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.limits import HEAD_SLICE, MAX_CHANNELS, MAX_RANK, MAX_SIDE
from lib.model.linear import LutLinear
from lib.model.surgery import projections
from lib.quant.fp16 import MASK_VALUE, round_to_fp16

MAX_SUM = 2048
"""Longest reduce_sum that is not reported: longer ones were found inexact."""

_LOGARITHMS = frozenset({"log", "log2", "log10", "log1p", "_log_softmax", "logsumexp", "softplus"})
_SUMS = frozenset({"sum", "mean", "_softmax", "_safe_softmax"})
SOFTMAXES = frozenset({"_softmax", "_safe_softmax"})
_MOVES = frozenset({"clone", "copy_", "_unsafe_view", "_to_copy"})
_DYNAMIC = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_NEGLIGIBLE = 24 * math.log(2)  # exp(-this) is below the smallest FP16 value


@dataclass
class Largest:
    """The largest of some numbers, and where it was."""

    value: int = 0
    where: str = ""

    def see(self, value: int, where: str) -> None:
        if value > self.value:
            self.value, self.where = value, where


class GraphLog:
    """What operations ran, told by the emulation one by one.

    Attributes:
        rank: highest rank of a computed result; ``moved_rank``: of a view or copy.
        sum: longest sum, that inside a mean or a softmax included.
        logarithms, dynamic: places of operations that a deployed graph must not have.
        score: largest magnitude that the mask was added to.
        finite: whether no softmax had an infinite input, mask included.
    """

    def __init__(self) -> None:
        self.rank = Largest()
        self.moved_rank = Largest()
        self.sum = Largest()
        self.logarithms: list[str] = []
        self.dynamic: list[str] = []
        self.score = 0.0
        self.finite = True

    def see(self, module: str, func: Any, op: str, args: tuple[Any, ...], result: Any) -> None:
        """Take in one operation and its result."""
        where = f"{module or 'the model'}: {op}"
        if op in _LOGARITHMS:
            self.logarithms.append(where)
        if _is_dynamic(func, op, args):
            self.dynamic.append(where)
        if isinstance(result, Tensor):
            moved = func.is_view or op in _MOVES
            (self.moved_rank if moved else self.rank).see(result.ndim, where)
            if op in _SUMS:
                self.sum.see(_summed(op, args, result), where)

    def see_softmax(self, scores: Tensor) -> None:
        """Take in the input of a softmax, mask included."""
        self.finite &= not any(math.isinf(end) for end in torch.aminmax(scores))

    def see_masked(self, scores: Tensor) -> None:
        """Take in what the mask is added to."""
        self.score = max(self.score, float(scores.abs().max()))


def _is_dynamic(func: Any, op: str, args: tuple[Any, ...]) -> bool:
    """Whether the result's shape, or what runs next, depends on values."""
    if op == "index":  # by numbers it does not, by truth values it does
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return any(tag in func.tags for tag in _DYNAMIC)


def _summed(op: str, args: tuple[Any, ...], result: Tensor) -> int:
    """How many numbers make one of the result."""
    if op in SOFTMAXES:
        return int(args[0].shape[args[1]])
    return int(args[0].numel() // max(result.numel(), 1))


class Status(StrEnum):
    """``ok``; ``note``: to be known, and no fault; ``broken``: fails the gate."""

    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact: its name, how it stands, and what was found."""

    name: str
    status: Status
    found: str


def graph_facts(model: PreTrainedModel, log: GraphLog) -> list[Fact]:
    """Every fact, in the order of the report.

    Args:
        model: the model with its own layers (not their deployed forms).
        log: of a run of the factored form, or of the baked one if there is no other.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    return [
        _mask(log),
        _absent("no log(softmax)", log.logarithms, "no logarithm in the graph"),
        _absent("static shapes", log.dynamic, "no operation whose shape depends on data"),
        _rank(log),
        _sides(model, positions),
        _channels(model),
        _head(model),
        _sums(log, positions),
    ]


def _mask(log: GraphLog) -> Fact:
    stored = float(round_to_fp16(torch.tensor(MASK_VALUE)))
    found = f"mask {stored:.0f}, added to scores up to {log.score:.6g}"
    if not math.isfinite(stored) or not log.finite:
        found += "; a softmax had an infinite input"
        return Fact(name="finite mask", status=Status.BROKEN, found=found)
    if 2 * log.score > -stored - _NEGLIGIBLE:
        found += "; hidden positions could show through it"
        return Fact(name="finite mask", status=Status.NOTE, found=found)
    return Fact(name="finite mask", status=Status.OK, found=found)


def _absent(name: str, places: list[str], otherwise: str) -> Fact:
    if not places:
        return Fact(name=name, status=Status.OK, found=otherwise)
    found = f"{places[0]} and {len(places) - 1} more" if len(places) > 1 else places[0]
    return Fact(name=name, status=Status.BROKEN, found=found)


def _rank(log: GraphLog) -> Fact:
    """Copies of rank 5 come from repeating key/value heads, which the exported graph stacks."""
    name = f"rank at most {MAX_RANK}"
    if log.rank.value > MAX_RANK:
        found = f"rank {log.rank.value} in {log.rank.where}"
        return Fact(name=name, status=Status.BROKEN, found=found)
    found = f"computed results have rank {log.rank.value} at most"
    if log.moved_rank.value > MAX_RANK:
        found += (
            f"; a copy of rank {log.moved_rank.value} in {log.moved_rank.where} is not in the "
            "exported graph, which stacks the heads that share keys"
        )
        return Fact(name=name, status=Status.NOTE, found=found)
    return Fact(name=name, status=Status.OK, found=found)


def deployed_shapes(model: PreTrainedModel, tokens: int) -> dict[str, tuple[int, int, int]]:
    """(channels, height, width) of the largest tensors by module, in the deployed layout, when a
    call takes ``tokens`` tokens and the cache has as many slots.

    Ranks (or groups) of a factored layer stand on the height axis; scores of the query heads that
    share keys stand below each other.
    """
    shapes = {}
    for name, layer in projections(model).items():
        rows, columns = int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
        rank = layer.spec.rank_of(columns) if isinstance(layer, LutLinear) else 1
        shapes[name] = (max(rows, columns), rank, tokens)
    config = model.config
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    shapes["attention scores"] = (shared, heads // shared * tokens, tokens)
    shapes["head"] = (min(config.vocab_size, HEAD_SLICE), 1, tokens)
    return shapes


def _largest_side(model: PreTrainedModel, tokens: int) -> Largest:
    side = Largest()
    for name, (_, height, width) in deployed_shapes(model, tokens).items():
        side.see(max(height, width), name)
    return side


def _sides(model: PreTrainedModel, positions: int | None) -> Fact:
    """Fails where a single token breaks the limit: nothing that export may choose avoids it."""
    name = f"width and height at most {MAX_SIDE}"
    least = _largest_side(model, 1)
    found = f"{least.value} in {least.where} with one token per call, the least that export takes"
    if least.value > MAX_SIDE:
        return Fact(name=name, status=Status.BROKEN, found=found)
    chosen = "export.context and export.prefill_tokens decide, and the package is audited"
    if positions is None:
        found += f"; the model's config names no longest context: {chosen}"
        return Fact(name=name, status=Status.NOTE, found=found)
    most = _largest_side(model, positions)
    found = (
        f"{most.value} in {most.where} with all {positions} positions in one call, the most that "
        "the model could be exported with"
    )
    if most.value > MAX_SIDE:
        return Fact(name=name, status=Status.NOTE, found=f"{found}; {chosen}")
    return Fact(name=name, status=Status.OK, found=found)


def _channels(model: PreTrainedModel) -> Fact:
    """They do not depend on the number of tokens."""
    largest = Largest()
    for module, (channels, _, _) in deployed_shapes(model, 1).items():
        largest.see(channels, module)
    status = Status.OK if largest.value <= MAX_CHANNELS else Status.BROKEN
    found = f"{largest.value} in {largest.where}"
    return Fact(name=f"channels at most {MAX_CHANNELS}", status=status, found=found)


def _head(model: PreTrainedModel) -> Fact:
    """Not judged: export cuts the head, and the slices of a package are audited."""
    entries = int(model.config.vocab_size)
    slices = math.ceil(entries / HEAD_SLICE)
    found = f"{slices} for a vocabulary of {entries}, {HEAD_SLICE} at most in each"
    return Fact(name="head slices", status=Status.NOTE, found=found)


def _sums(log: GraphLog, positions: int | None) -> Fact:
    """Noted, never failed: how much a long sum loses on a device is not known, nor emulated."""
    name = f"reduce_sum at most {MAX_SUM}"
    found = f"the longest that ran has {log.sum.value} terms, {log.sum.where}"
    noted = log.sum.value > MAX_SUM
    if positions is not None and positions > MAX_SUM:
        found += f"; a softmax has one for each slot of the cache, {positions} at most"
        noted = True
    if noted:
        found += "; longer ones were found inexact, sum in two steps or by a matrix product"
    return Fact(name=name, status=Status.NOTE if noted else Status.OK, found=found)
