"""The ladder: the same measurements for the teacher and every stage."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.errors import MismatchError
from lib.evaluate.agreement import TeacherTarget
from lib.evaluate.memory import peak_megabytes, reset_peak
from lib.evaluate.perplexity import perplexity
from lib.evaluate.samples import generate_texts
from lib.evaluate.tasks import Score, TaskSuite
from lib.model.size import ModelSize, folder_megabytes, model_size
from lib.model.surgery import bake
from lib.params.schema import Evaluate


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A model to measure: its name, how to get it, and its folder if it has one."""

    name: str
    load: Callable[[], PreTrainedModel]
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Test text: ``stream [N]``, ``input_ids [S, L]`` and ``lengths [S]``, all integers."""

    stream: np.ndarray
    input_ids: np.ndarray
    lengths: np.ndarray

    def limited(self, params: Evaluate) -> HeldOut:
        """At most ``perplexity_tokens`` of the stream and ``sequences`` rows, drawn by seed."""
        order = np.random.default_rng(params.seed).permutation(len(self.lengths))
        rows = np.sort(order[: params.sequences])
        return HeldOut(
            stream=self.stream[: params.perplexity_tokens],
            input_ids=self.input_ids[rows],
            lengths=self.lengths[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one rung measured. ``kl`` in nats per position, sizes in 10^6 bytes."""

    name: str
    perplexity: float
    ratio: float
    kl: float
    top1: float
    size: ModelSize
    file_mb: float | None
    peak_memory_mb: float
    samples: list[str]
    tasks: dict[str, Score]


@dataclass(kw_only=True)
class Ladder:
    """All rows, the teacher first, and what they were measured on."""

    prompts: list[str]
    scored_tokens: int
    scored_positions: int
    task_seed: int
    """Seed that items of the tasks were drawn with."""
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


def measure_ladder(
    rungs: Sequence[Rung],
    text: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    params: Evaluate,
    device: torch.device,
) -> Ladder:
    """Measure every rung, one model in memory at a time. The first rung is the teacher.

    Raises:
        InputError: no text to score, or tasks that cannot be measured here.
        MismatchError: a rung of another vocabulary than the teacher's or the text's.
    """
    # what is missing shows before the hard work
    suite = TaskSuite(params.tasks, params.task_items, params.seed)
    text = text.limited(params)
    ladder = Ladder(
        prompts=list(params.prompts),
        scored_tokens=len(text.stream) - 1,
        scored_positions=int(np.maximum(text.lengths.astype(np.int64) - 1, 0).sum()),
        task_seed=params.seed,
        machine={},
    )
    target: TeacherTarget | None = None
    for rung in rungs:
        resettable = reset_peak()
        model = rung.load().to(device)  # type: ignore[arg-type]
        _check_vocabulary(model, text, rung.name)
        size = model_size(model)
        bake(model)  # one dense product per layer instead of dequantizing in every forward pass
        window, stride = params.perplexity_window, params.perplexity_stride
        ppl = perplexity(model, text.stream, window, stride, f"{rung.name}: perplexity windows")
        if target is None:
            target = TeacherTarget(model, text.input_ids, text.lengths)
            teacher_perplexity = ppl
            kl, top1 = 0.0, 1.0  # the teacher against itself, by definition
        else:
            agreement = target.compare(model, f"{rung.name}: agreement batches")
            kl, top1 = agreement.kl, agreement.top1
        samples = generate_texts(
            model, tokenizer, ladder.prompts, params.new_tokens, seed=params.seed
        )
        ladder.machine = _machine(model, resettable)
        peak = peak_megabytes()  # without the tasks, which not every run asks for
        tasks = suite.measure(model, tokenizer, rung.name)
        del model
        ladder.rows.append(
            Row(
                name=rung.name,
                perplexity=ppl,
                ratio=ppl / teacher_perplexity,
                kl=kl,
                top1=top1,
                size=size,
                file_mb=None if rung.folder is None else folder_megabytes(rung.folder),
                peak_memory_mb=peak,
                samples=samples,
                tasks=tasks,
            )
        )
    return ladder


def _check_vocabulary(model: PreTrainedModel, text: HeldOut, name: str) -> None:
    known = int(model.config.vocab_size)
    largest = max((int(ids.max()) for ids in (text.stream, text.input_ids) if ids.size), default=0)
    if largest >= known:
        raise MismatchError(
            f"the test text has token {largest}, the vocabulary of {name} ends at {known - 1}; "
            "make tokens and model with one tokenizer (rerun stage tokens)"
        )


def _machine(model: PreTrainedModel, resettable: bool) -> dict[str, Any]:
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_memory_is_per_row": resettable,
    }
