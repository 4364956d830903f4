"""One training stage, folder to folder: load, check that things belong together, train, save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.base.device import product_type, resolve_device, set_threads
from lib.base.errors import InputError, MismatchError, NonFiniteError
from lib.base.files import code_fingerprint, fingerprint
from lib.base.scratch import scratch_folder
from lib.base.workers import is_main, join
from lib.cache.shards import CacheReader
from lib.model.checkpoint import load_checkpoint, read_config
from lib.model.surgery import has_masters
from lib.objective.distillation import Objective, make_objective
from lib.objective.lesson import CachedLoss, CachedRows, cached_lesson
from lib.objective.loss import Batches, Loss
from lib.params.data import Run
from lib.params.training import Distill, LoopConfig, TrainConfig
from lib.train.average import Values, save_trained
from lib.train.by_block import BlockMethod, Task, train_by_block
from lib.train.grid_report import grid_report
from lib.train.log import reporting, result_of, write_log
from lib.train.loop import Report, Trainer
from lib.train.method import ByBlock
from lib.train.penalty import MakePenalty, no_penalty
from lib.train.source import LiveTeacher
from lib.train.state import Progress


@dataclass(frozen=True)
class Start:
    """A model that can be trained, and where it comes from."""

    model: PreTrainedModel
    teacher: str
    """Fingerprint of the teacher it is distilled from."""
    parent: str
    """Fingerprint of the folder it was loaded from."""


def start_from_checkpoint(folder: Path) -> Start:
    """What the stage quant, another training stage or a conversion left.

    Raises:
        MismatchError: the checkpoint is snapped or baked, and cannot train.
    """
    config = read_config(folder)
    model, info = load_checkpoint(folder)
    if not has_masters(model):
        raise MismatchError(
            f"{folder} is snapped or baked and holds no master weights; train from the checkpoint "
            "that it was snapped from"
        )
    if "teacher" not in info:
        raise InputError(f"{folder} does not say which teacher it comes from; train it anew")
    return Start(model, info["teacher"], config["fingerprint"])


def objective_of(params: LoopConfig, distill: Distill, cache: CacheReader) -> Objective:
    """What a training section and `distill` ask for, on one cache.

    Raises:
        MismatchError: see :func:`lib.objective.distillation.make_objective`.
    """
    return make_objective(
        cache,
        temperature=distill.temperature,
        target=distill.target,
        distill_weight=params.distill_weight,
        hard_top1_weight=params.hard_top1_weight,
        hard_full_weight=params.hard_full_weight,
    )


def lesson_of(
    params: LoopConfig, distill: Distill, train: CacheReader, val: CacheReader
) -> tuple[CachedLoss, CachedRows]:
    """Loss and rows that a training section and `distill` ask for, on the cache ``train``.

    Raises:
        MismatchError, ParamsError: see :func:`lib.objective.lesson.cached_lesson`.
    """
    return cached_lesson(
        train,
        val,
        temperature=distill.temperature,
        target=distill.target,
        distill_weight=params.distill_weight,
        hard_top1_weight=params.hard_top1_weight,
        hard_full_weight=params.hard_full_weight,
    )


Reporting = Callable[..., contextlib.AbstractContextManager[Report]]


_Trained = tuple[PreTrainedModel, Progress, Values]  # with EMA also what was not averaged


def _end_to_end(
    task: Task,
    live: LiveTeacher | None,
    distill: Distill,
    run: Run,
    report: Reporting,
    penalty: MakePenalty,
) -> _Trained:
    loss: Loss = task.objective
    batches: Batches = task.train
    if live is not None:
        loss, batches = live.load(task.params, distill, task.objective.measured(), task.device)
    trainer = Trainer(
        task.model,
        task.params,
        loss,
        batches,
        task.val,
        task.device,
        task.scratch,
        penalty=penalty,
        shard=run.shard,
    )
    with report(steps=task.params.steps) as tell:
        result = trainer.run(tell)
    return result.model, result.progress, result.plain


def run_identity(params: LoopConfig, declared: str, device: torch.device) -> dict[str, str]:
    """What of a run besides its inputs a saved state must have in common with it."""
    return {
        "params": declared,
        "code": code_fingerprint(),
        "device": device.type,
        "products": str(product_type(params.dtype, device)),
    }


@contextlib.contextmanager
def _naming(stage: str) -> Iterator[None]:
    """Say in which stage a loss stopped being finite, and what may help."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{stage}: {error}; lower {stage}.rates, or check the model it starts from"
        ) from None


def _grid_figures(model: PreTrainedModel, atol: float | None, out: Path) -> dict[str, float]:
    """Write how well the masters fit their grid, and return a few numbers of it."""
    if atol is None:
        return {}
    report = grid_report(model, atol)
    if is_main():
        report.write(out)
    return report.metrics()


def _block_after_block(method: BlockMethod, scratch: Path, report: Reporting) -> _Trained:
    with report(steps=sum(map(method.steps, method.numbers()))) as tell:
        progress = train_by_block(method, scratch, tell)
    return method.task.model, progress, method.plain


def train_stage(
    stage: str,
    start: Start,
    cache: Path,
    out: Path,
    *,
    params: TrainConfig,
    distill: Distill,
    run: Run,
    tokenizer_from: Path,
    declared: str,
    by_block: ByBlock | None = None,
    live: LiveTeacher | None = None,
    penalty: MakePenalty = no_penalty,
    grid_atol: float | None = None,
) -> Progress:
    """Train ``start`` on ``cache`` and write ``out/model``, ``out/log.csv``, ``out/metrics.json``.

    With EMA the model holds averaged parameters, and ``out/model/plain`` those that were not.

    Args:
        declared: fingerprint of the params that define the run; with the inputs' and the code's
            it keys the state that a killed run resumes from.
        by_block: train one decoder block after the other; None = end to end.
        live: learn from the teacher itself; None = from its cache.
        penalty: end to end only: the regularizer.
        grid_atol: `prox.atol`, where ``out/grid.json`` and ``out/grid.svg`` are wanted too.

    Raises:
        MismatchError: cache, teacher or vocabulary do not belong together; both sides are named.
        NonFiniteError: see :meth:`lib.train.loop.Trainer.run`.
        BusyError: another process trains the same run.
    """
    set_threads(run.threads)
    device = join(resolve_device(run.device))
    vocabulary = start.model.config.vocab_size
    expect: dict[str, Any] = {"teacher": start.teacher, "vocab_size": vocabulary}
    train, val = (CacheReader(cache / split, expect) for split in ("train", "val"))
    identity: dict[str, Any] = {
        **run_identity(params, declared, device),
        "parent": start.parent,
        "train": train.fingerprint,
        "val": val.fingerprint,
    }
    for name, way in (("by_block", by_block), ("live", live)):
        if way is not None:
            identity[name] = way.identity(start.teacher)
    with scratch_folder(stage, fingerprint(identity)) as scratch:
        objective, rows = lesson_of(params, distill, train, val)
        report = partial(
            reporting,
            stage,
            folder=out,
            run=run,
            config=params.model_dump(mode="json"),
            tokens_per_step=params.batch_size * params.grad_accum * train.spec.max_length,
        )
        task = Task(start.model, params, objective, rows, val, device, scratch)
        with _naming(stage):
            if by_block is None:
                model, progress, plain = _end_to_end(task, live, distill, run, report, penalty)
            else:
                model, progress, plain = _block_after_block(by_block.make(task), scratch, report)
        figures = _grid_figures(model, grid_atol, out)
        info = {
            "stage": stage,
            "teacher": start.teacher,
            "parent": start.parent,
            "cache": train.fingerprint,
            "params": declared,
            "code": identity["code"],
            "result": {**result_of(progress), **figures},
        }
        if is_main():
            save_trained(model.cpu(), plain, out / "model", tokenizer_from, info)
            write_log(out, stage, progress, run.log_every, figures)
    return progress
