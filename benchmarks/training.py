"""Training within a budget: this project's loop, for its own recipes and for torchao's layers.

The budget pays for the steps, the evaluations that choose the best of them, and the teacher's pass
over every sequence that is seen. That pass is read from data/cache; what it costs is measured.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.budget import Made, Work, steps_for, steps_of
from lib.cache.shards import CacheReader
from lib.capture.build import capture_rows
from lib.model.calibrate import quantize_calibrated
from lib.model.linear import ParameterRole
from lib.model.load import load_causal_lm
from lib.model.size import model_size
from lib.model.surgery import quantized_layers
from lib.params.load import load_params
from lib.params.specs import model_spec
from lib.params.training import Distill, LoopConfig, Quant, TrainConfig, Weights
from lib.text.sequences import TokenSet
from lib.train.loop import Trainer
from lib.train.roles import Trainable
from lib.train.run import objective_of

CPU = torch.device("cpu")
HELD_OUT = 12  # sequences that choose the best step
TRIAL_STEPS = 2  # timed, after one that compiles
CAPTURED = 8  # sequences that the teacher's pass is timed on

Trainables = Callable[[PreTrainedModel], list[Trainable]]


class Tuning(LoopConfig):
    """Training of plain parameters at one rate."""

    rate: float
    """Learning rate."""

    def rate_of(self, role: str) -> float:
        """The rate, for what is no part of a layer of this project."""
        return self.rate if role == ParameterRole.ADAPTER else 0.0


def sized(section: LoopConfig, steps: int) -> LoopConfig:
    """The section with so many steps, evaluated at the end only."""
    changes = {
        "steps": steps,
        "warmup_steps": min(section.warmup_steps, steps),
        "eval_every": steps,
        "eval_sequences": HELD_OUT,
        "checkpoint_every": steps,
    }
    return type(section)(**{**section.model_dump(), **changes})


class _Training:
    """What the phases of a run have in common."""

    def __init__(self, work: Work, distill: Distill, trainables: Trainables | None) -> None:
        self.work, self.distill, self.trainables = work, distill, trainables
        self.data, self.val = (CacheReader(work.data / "cache" / s) for s in ("train", "val"))

    def trainer(self, model: PreTrainedModel, section: LoopConfig, scratch: Path) -> Trainer:
        return Trainer(
            model,
            section,
            objective_of(section, self.distill, self.data),
            self.data,
            self.val,
            CPU,
            scratch,
            trainables=None if self.trainables is None else self.trainables(model),
        )

    def trial(self, model: PreTrainedModel, section: LoopConfig) -> tuple[float, float]:
        """Seconds of a step and of an evaluation, on a copy of the model."""
        with TemporaryDirectory() as folder:
            trainer = self.trainer(copy.deepcopy(model), sized(section, 10), Path(folder))
            trainer.held_out_loss()
            trainer.train_step()
            began = time.perf_counter()
            for _ in range(TRIAL_STEPS):
                trainer.train_step()
            stepped = time.perf_counter()
            trainer.held_out_loss()
            return (stepped - began) / TRIAL_STEPS, time.perf_counter() - stepped

    def run(self, model: PreTrainedModel, section: LoopConfig) -> dict[str, Any]:
        """Train in place; the held-out loss before and after."""
        with TemporaryDirectory() as folder:
            progress = self.trainer(model, section, Path(folder)).run(lambda _: None).progress
        return {
            "steps": progress.step,
            "best_step": progress.best_step,
            "kd_before": progress.initial_loss,
            "kd_after": progress.best_loss,
        }


def teacher_seconds(work: Work, cache: CacheReader) -> float:
    """What the teacher's pass over a training sequence takes, as the stage `cache` makes it."""
    tokens = TokenSet(work.data / "tokens" / "train")
    count = min(CAPTURED, len(tokens))
    with torch.inference_mode():
        teacher = work.teacher()
        capture_rows(teacher, tokens, cache.spec, 0, count)
        began = time.perf_counter()
        capture_rows(teacher, tokens, cache.spec, 0, count)
    return (time.perf_counter() - began) / count


def train(
    work: Work,
    model: PreTrainedModel,
    sections: list[LoopConfig],
    trainables: Trainables | None = None,
    distill: Distill | None = None,
) -> dict[str, Any]:
    """Train a model in place, section after section, as long as the budget allows.

    The sections' steps only say in which proportion they share it.
    """
    training = _Training(work, distill or Distill(), trainables)
    with work.clock.aside():
        sequence = teacher_seconds(work, training.data)
        trials = [training.trial(model, section) for section in sections]
    shares = [section.steps for section in sections]
    batch = sections[0].batch_size
    step = sum(s * share for (s, _), share in zip(trials, shares, strict=True)) / sum(shares)
    held_out = min(HELD_OUT, len(training.val))
    evaluations = 2 * sum(seconds for _, seconds in trials)
    left = work.left - evaluations - held_out * sequence
    rows = len(training.data)
    steps = steps_of(shares, steps_for(left, step, sequence, batch, rows))
    phases = [
        training.run(model, sized(section, count))
        for section, count in zip(sections, steps, strict=True)
    ]
    seen = min(rows, batch * sum(steps))
    work.clock.charged += (seen + held_out) * sequence
    return {
        "steps": sum(steps),
        "sequences": seen,
        "teacher_seconds": (seen + held_out) * sequence,
        "kd_before": phases[0]["kd_before"],
        "kd_after": phases[-1]["kd_after"],
        "phases": phases,
    }


def staged(work: Work) -> Made:
    """The default recipe's way to 4 bits: quantize, then stages scales, weights and finetune."""
    params = load_params(work.params)
    stages: list[TrainConfig] = [params.scales, params.weights, params.finetune]
    stages = [stage for stage in stages if stage.steps]
    return _own(work, params.quant, params.calibrate.sequences, stages, params.distill)


def at_once(work: Work, quant: dict[str, Any], rates: dict[str, float], sequences: int) -> Made:
    """Quantize, looking at ``sequences`` of the text, then train scales and weights together."""
    section = Weights(
        rates=rates,  # type: ignore[arg-type]
        schedule="cosine",
        warmup_steps=4,
        seed=0,
        hard_top1_weight=0.0,
        hard_full_weight=0.0,
    )
    return _own(work, Quant(**quant), sequences, [section], Distill())


def untrained(teacher: Path, cache: Path, quant: Quant, sequences: int) -> PreTrainedModel:
    """A teacher quantized, looking at the first ``sequences`` of its cache where that is needed."""
    model = load_causal_lm(teacher)
    text = CacheReader(cache / "train").sequences
    quantize_calibrated(model, model_spec(quant), lambda: text(sequences))
    return model


def _own(
    work: Work, quant: Quant, sequences: int, sections: list[TrainConfig], distill: Distill
) -> Made:
    model = work.teacher()
    ids, lengths = work.text()
    quantize_calibrated(model, model_spec(quant), lambda: (ids[:sequences], lengths[:sequences]))
    run = train(work, model, list(sections), distill=distill)
    bits = model_size(model).bits_per_layer_weight
    assert bits is not None
    weights = {
        name: layer.dequantized().detach() for name, layer in quantized_layers(model).items()
    }
    return Made(weights=weights, bits=bits, run=run)
