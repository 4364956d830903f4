"""Losses that look at one decoder block: its MLP beside the full-precision one, or its output.

Shapes: hidden states ``[B, L, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib.model.blocks import decoder_blocks, part, run_part
from lib.objective.lesson import CachedLoss, CachedRows
from lib.objective.loss import Batch, LossSums

_NORMALIZED_SHARE = 0.8  # of the local loss; the rest is the relative error, as in the reference
_EPSILON = 1e-6  # under the root of a mean square


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + _EPSILON)


def reconstruction(found: Tensor, wanted: Tensor) -> Tensor:
    """How far outputs ``[N, D]`` are from the wanted ones: 0.8 times the mean squared error of the
    RMS-normalized rows plus 0.2 times ``|found - wanted|^2 / |wanted|^2``."""
    normalized = F.mse_loss(_normalized(found), _normalized(wanted))
    relative = (found - wanted).square().sum() / wanted.square().sum().clamp_min(_EPSILON)
    return _NORMALIZED_SHARE * normalized + (1 - _NORMALIZED_SHARE) * relative


@dataclass(frozen=True)
class TailBatch:
    """Sequences as they arrive at a block, and what the teacher says at the end of the model."""

    hidden: Tensor
    cached: Batch

    @property
    def mask(self) -> Tensor:
        """bool ``[B, L - 1]``: the position predicts a real token."""
        return self.cached.mask

    def to(self, device: torch.device) -> TailBatch:
        """The same batch on another device."""
        return TailBatch(self.hidden.to(device), self.cached.to(device))


class TailBatches:
    """A teacher cache together with the hidden states in front of one block, ``[N, L, D]``."""

    def __init__(self, cache: CachedRows, hidden: np.ndarray) -> None:
        self.cache, self.hidden = cache, hidden

    def __len__(self) -> int:
        return len(self.hidden)

    def batch(self, rows: np.ndarray) -> TailBatch:
        """These rows, in this order."""
        return TailBatch(torch.from_numpy(self.hidden[rows]), self.cache.batch(rows))


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """``local_weight * local + global_weight * (KD and labels) + hard terms`` of one block.

    Local: :func:`reconstruction` of the block's MLP output on ``tokens`` sampled real positions,
    against the full-precision MLP on the same input.

    Attributes:
        objective: the terms at the end of the model.
        block: its number; mlp: the full-precision MLP ``[..., D] -> [..., D]``.
    """

    name: ClassVar[str] = "kd"
    objective: CachedLoss
    block: int
    mlp: nn.Module
    local_weight: float
    global_weight: float
    tokens: int

    def measured(self) -> Self:
        """The KD term alone."""
        return replace(
            self, objective=self.objective.measured(), local_weight=0.0, global_weight=1.0
        )

    def __call__(self, model: PreTrainedModel, batch: TailBatch) -> LossSums:
        """Loss sums of one batch; the blocks in front of the trained one do not run."""
        seen: list[tuple[Tensor, Tensor]] = []

        def watch(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen.append((inputs[0], output))

        mlp: Any = decoder_blocks(model)[self.block].mlp
        handle = mlp.register_forward_hook(watch)
        try:
            hidden = run_part(part(model, self.block, None, norm=True), batch.hidden)
        finally:
            handle.remove()
        sums = self.objective.of_hidden(model, hidden, batch.cached).sums(self.global_weight)
        if self.local_weight == 0:
            return sums
        local = self._local(*seen[0], batch.mask)
        return replace(sums, total=sums.total + self.local_weight * local * sums.count)

    def _local(self, x: Tensor, found: Tensor, mask: Tensor) -> Tensor:
        places = mask.flatten().nonzero().flatten()  # of [B, L - 1]
        places = places[torch.randperm(len(places))[: self.tokens].to(places.device)]
        x, found = (value[:, :-1].flatten(0, 1)[places] for value in (x, found))
        with torch.no_grad():
            wanted = self.mlp(x)
        return reconstruction(found, wanted)


@dataclass(frozen=True)
class BlockBatch:
    """Inputs of a block and the outputs that are wanted of it."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    """bool ``[B, L]``: a real token."""

    def to(self, device: torch.device) -> BlockBatch:
        """The same batch on another device."""
        return BlockBatch(self.inputs.to(device), self.targets.to(device), self.mask.to(device))


class BlockBatches:
    """Inputs and wanted outputs of one block, ``[N, L, D]`` each; lengths ``[N]``."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, lengths: Tensor) -> None:
        self.inputs, self.targets, self.lengths = inputs, targets, lengths

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: np.ndarray) -> BlockBatch:
        """These rows, in this order."""
        inputs, targets = (torch.from_numpy(x[rows]) for x in (self.inputs, self.targets))
        places = torch.arange(inputs.shape[1])
        return BlockBatch(inputs, targets, places < self.lengths[rows][:, None])


class BlockLoss:
    """Mean squared error of a block's outputs (EfficientQAT, section 3.2, "Block-AP")."""

    name = "block"

    def measured(self) -> BlockLoss:
        """Itself: there is nothing else in it."""
        return self

    def __call__(self, model: nn.Module, batch: BlockBatch) -> LossSums:
        """Sums over real tokens of the mean over D."""
        errors = (run_part(model, batch.inputs) - batch.targets).square().mean(dim=-1)
        loss = torch.where(batch.mask, errors, torch.zeros((), device=errors.device)).sum()
        return LossSums(loss, loss.detach(), batch.mask.sum())
