"""A tiny training run: settings, the trainer and its outcome."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lib.model.checkpoint import save_checkpoint
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.model.surgery import quantize_model
from lib.objective.distillation import make_objective
from lib.params.training import Rates, TrainConfig
from lib.quant.spec import ModelSpec
from lib.train.loop import Trainer, TrainResult
from lib.train.run import Start
from lib.train.state import Progress
from tests.tiny_models import CPU, readers

BOTH = Rates(weight=3e-4, scale_direction=1e-3, scale_magnitude=1e-3)


def config(**changes: Any) -> TrainConfig:
    """Six steps of eight sequences; everything trains."""
    values: dict[str, Any] = {
        "steps": 6,
        "batch_size": 8,
        "rates": BOTH,
        "eval_every": 2,
        "eval_sequences": 16,
        "checkpoint_every": 2,
    }
    return TrainConfig(**{**values, **changes})


def start_of(teacher: Path, spec: ModelSpec) -> Start:
    """What the stage quant makes of a teacher without looking at its activations."""
    model, mark = load_causal_lm(teacher), folder_fingerprint(teacher)
    quantize_model(model, spec)
    return Start(model, mark, mark)


def save_start(teacher: Path, spec: ModelSpec, out: Path) -> None:
    """:func:`start_of` as a checkpoint."""
    start = start_of(teacher, spec)
    save_checkpoint(start.model, out, tokenizer_from=teacher, info={"teacher": start.teacher})


def trainer(
    model: PreTrainedModel,
    cache: Path,
    scratch: Path,
    params: TrainConfig,
    target: str = "candidates",
) -> Trainer:
    """A trainer on the caches under ``cache``."""
    train, val = readers(cache)
    objective = make_objective(
        train,
        temperature=2.0,
        target=target,
        distill_weight=params.distill_weight,
        hard_top1_weight=params.hard_top1_weight,
        hard_full_weight=params.hard_full_weight,
    )
    return Trainer(model, params, objective, train, val, CPU, scratch)


def quiet(_progress: Progress) -> None:
    """A report that says nothing."""


def train(
    model: PreTrainedModel,
    cache: Path,
    scratch: Path,
    params: TrainConfig,
    target: str = "candidates",
) -> TrainResult:
    """Train ``model`` in place, from the start: in a new folder under ``scratch``."""
    scratch.mkdir(exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=scratch))
    return trainer(model, cache, fresh, params, target).run(quiet)


def losses(result: TrainResult) -> list[float]:
    """Training loss of every step."""
    return [float(row["loss"] or 0.0) for row in result.progress.rows[1:]]
