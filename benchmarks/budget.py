"""The time that a method gets, and how much of its work fits into it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import InputError


class Clock:
    """Wall-clock seconds of a method's work.

    Loading the teacher, imports and trial runs that find out how long a step takes are set aside;
    work that was done before (the teacher's cached logits) is charged.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._aside = 0.0
        self._depth = 0
        self.charged = 0.0

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens in the block does not count."""
        began = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._aside += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Counted so far."""
        return time.perf_counter() - self._began - self._aside + self.charged


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a method returns.

    Attributes:
        weights: dense ``[out, in]`` of every projection, by name.
        bits: stored bits per weight of them, everything counted.
        run: figures of the run, such as its steps.
    """

    weights: dict[str, Tensor]
    bits: float
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Work:
    """What a method has: the teacher, the training text, and time.

    Attributes:
        data: folder with ``teacher``, ``tokens`` and ``cache`` of the pipeline.
        params: params.yaml, for the default recipe.
        seconds: the budget; methods that do not train take what they take.
    """

    data: Path
    params: Path
    seconds: float
    clock: Clock = field(default_factory=Clock)

    def teacher(self) -> PreTrainedModel:
        """A fresh teacher, float32 on the CPU; loading it does not count."""
        from lib.model.load import load_causal_lm

        with self.clock.aside():
            return load_causal_lm(self.data / "teacher")

    def text(self) -> tuple[Tensor, Tensor]:
        """The training sequences: ids long ``[N, L]``, right-padded, and lengths ``[N]``."""
        from lib.text.sequences import TokenSet

        tokens = TokenSet(self.data / "tokens" / "train")
        return torch.tensor(tokens.input_ids, dtype=torch.int64), torch.tensor(tokens.lengths)

    @property
    def left(self) -> float:
        """Seconds of the budget that are not spent."""
        return self.seconds - self.clock.seconds


def steps_for(seconds: float, step: float, sequence: float, batch: int, rows: int) -> int:
    """Optimizer steps for which there is time, at least one.

    Args:
        step: seconds of one; sequence: what the teacher takes for a sequence that was not seen yet.
        batch: sequences of a step; rows: sequences that there are.
    """
    fresh = int(seconds // (step + batch * sequence))
    if fresh * batch <= rows:
        return max(1, fresh)
    return max(1, int((seconds - rows * sequence) // step))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A short run of a method that works block by block: what it took."""

    blocks: int
    iterations: int
    seconds: float


def iterations_for(seconds: float, blocks: int, trials: tuple[Trial, Trial, Trial]) -> int:
    """Iterations per block for which there is time, at least one.

    Args:
        trials: one block, two blocks, and two blocks with more iterations; the time is taken for
            ``a + blocks * (b + c * iterations)``.

    Raises:
        InputError: they do not tell what an iteration takes.
    """
    one, two, longer = trials
    each = (longer.seconds - two.seconds) / (two.blocks * (longer.iterations - two.iterations))
    if each <= 0:
        raise InputError("more iterations took no longer in a trial run: the machine is too busy")
    block = max((two.seconds - one.seconds) / (two.blocks - one.blocks), each * one.iterations)
    once = max(one.seconds - one.blocks * block, 0.0)
    fixed = block - each * one.iterations
    return max(1, int(((seconds - once) / blocks - fixed) // each))


def steps_of(shares: list[int], total: int) -> list[int]:
    """``total`` steps (or one each, if that is more) in the proportion of ``shares``."""
    return [max(1, round(total * share / sum(shares))) for share in shares]
