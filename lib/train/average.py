"""The parameters that a run keeps: those of its best step, and their moving average.

With a decay d the average is updated after every step, average <- d average + (1 - d) parameter. It
is what is evaluated and what the model ends with; the plain parameters of the same step are kept
beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.files import atomic_folder
from lib.model.checkpoint import write_checkpoint
from lib.model.linear import LutLinear
from lib.train.parallel import part_of, whole
from lib.train.roles import Trainable

PLAIN = "plain"
"""Subfolder of a checkpoint of averaged parameters: the checkpoint of those that are not."""

Values = dict[str, Tensor]
"""Parameters by their name in the model."""


def snapshot(trainables: list[Trainable]) -> Values:
    """Copies of what trains, as it is now."""
    return {item.name: item.parameter.detach().clone() for item in trainables}


@torch.no_grad()
def restore(trainables: list[Trainable], values: Values) -> None:
    """What trains gets other values."""
    for item in trainables:
        item.parameter.copy_(values[item.name])


class Kept:
    """What one run keeps beside its parameters.

    Attributes:
        best: parameters of the best step; averaged ones where there is an average.
        average: the moving average as it is now; empty without one.
        plain: the parameters of the best step that were not averaged; empty without an average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.best: Values = {}
        self.average: Values = {}
        self.plain: Values = {}

    def start(self, trainables: list[Trainable]) -> None:
        """The average begins with the parameters that the run begins with."""
        if self.decay > 0:
            self.average = snapshot(trainables)

    @torch.no_grad()
    def follow(self, trainables: list[Trainable]) -> None:
        """One step of the average."""
        if self.decay > 0:
            for item in trainables:
                self.average[item.name].lerp_(item.parameter, 1 - self.decay)

    @contextlib.contextmanager
    def evaluated(self, trainables: list[Trainable]) -> Iterator[None]:
        """Inside the block the parameters are the averaged ones, where there are such."""
        if not self.average:
            yield
            return
        plain = snapshot(trainables)
        restore(trainables, self.average)
        try:
            yield
        finally:
            restore(trainables, plain)

    def keep(self, trainables: list[Trainable]) -> None:
        """This step is the best so far."""
        now = snapshot(trainables)
        if self.average:
            self.best = {name: value.clone() for name, value in self.average.items()}
            self.plain = now
        else:
            self.best = now

    def tensors(self) -> Values:
        """All of it by name, for the state that a killed run resumes from."""
        return {
            f"{kind}.{name}": value
            for kind, values in self._kinds().items()
            for name, value in values.items()
        }

    def load(self, tensors: Values, trainables: list[Trainable]) -> None:
        """Inverse of :meth:`tensors`; other names are passed over."""
        like = {item.name: item.parameter for item in trainables}
        kinds = self._kinds()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind in kinds:
                kinds[kind][name] = part_of(value.to(like[name].device), like[name])

    def _kinds(self) -> dict[str, Values]:
        return {"best": self.best, "average": self.average, "plain": self.plain}

    def whole_plain(self) -> Values:
        """``plain`` with all shards, on the CPU; every process has to ask."""
        return {name: whole(value).cpu().contiguous() for name, value in self.plain.items()}


@torch.no_grad()
def put_plain(model: nn.Module, plain: Values) -> None:
    """Give a trained model its plain parameters, and trained weights the indices that follow."""
    for name, value in plain.items():
        model.get_parameter(name).copy_(value)
    for name in plain:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent)
        if isinstance(layer, LutLinear) and leaf == "weight":
            layer.refresh_indices()


def save_trained(
    model: PreTrainedModel,
    plain: Values,
    folder: Path,
    tokenizer_from: Path,
    info: dict[str, Any],
) -> None:
    """Write a trained model's checkpoint, and inside it (:data:`PLAIN`) that of its plain
    parameters where it holds averaged ones; both at once, or nothing.

    The model ends with the plain parameters.

    Args:
        plain: of :class:`Kept`; empty without an average.
        info: as for :func:`lib.model.checkpoint.save_checkpoint`. Its ``result`` is what was
            measured, which plain parameters were not.
    """
    with atomic_folder(folder) as temporary:
        if not plain:
            write_checkpoint(model, temporary, tokenizer_from=tokenizer_from, info=info)
            return
        averaged = {**info, "averaged": True}
        write_checkpoint(model, temporary, tokenizer_from=tokenizer_from, info=averaged)
        put_plain(model, plain)
        unmeasured = {key: value for key, value in info.items() if key != "result"}
        write_checkpoint(
            model,
            temporary / PLAIN,
            tokenizer_from=tokenizer_from,
            info={**unmeasured, "averaged": False},
        )
