"""Recovery adapters from folder to folder: put on a finished model, trained, saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lib.base.device import resolve_device, set_threads
from lib.base.errors import InputError, MismatchError, NonFiniteError
from lib.base.files import fingerprint
from lib.base.scratch import scratch_folder
from lib.base.workers import is_main, join
from lib.model.adapter import add_adapters, lora_config, save_adapter
from lib.model.checkpoint import load_checkpoint, read_config
from lib.model.surgery import is_mlp, quantized_layers
from lib.params.data import Run
from lib.params.recover import Recover
from lib.params.training import Distill
from lib.recover.lesson import Folders, make_lesson
from lib.train.log import reporting, result_of, write_log
from lib.train.loop import Trainer
from lib.train.run import run_identity
from lib.train.state import Progress

STAGE = "recover"


def targets_of(model: PreTrainedModel, params: Recover) -> list[str]:
    """Projections that get adapters: the quantized ones, less those that ``params`` leaves out.

    Raises:
        MismatchError: nothing is quantized.
    """
    names = {name.rsplit(".", 1)[-1] for name in quantized_layers(model)}
    if not names:
        raise MismatchError(
            "adapters go beside quantized layers, and the model has none (it is baked); set "
            "snap.form to lut, or recover.steps to 0"
        )
    return sorted(
        name
        for name in names
        if not (params.mlp_only and not is_mlp(name)) and not (params.skip_k and name == "k_proj")
    )


def with_adapters(model: PreTrainedModel, params: Recover) -> PreTrainedModel:
    """The model, frozen, with untrained adapters as ``params`` says, in place.

    Raises:
        ParamsError, MismatchError: see :func:`lib.model.adapter.add_adapters`.
    """
    targets = targets_of(model, params)
    config = lora_config(params.rank, params.alpha, params.dropout, targets)
    add_adapters(model, config, params.seed)
    if params.dropout:
        model.train()
    return model


def recover_stage(
    checkpoint: Path,
    folders: Folders,
    out: Path,
    *,
    params: Recover,
    distill: Distill,
    run: Run,
    declared: str,
) -> Progress:
    """Train adapters on ``checkpoint`` and write ``out/adapter``, ``out/log.csv``,
    ``out/metrics.json``; the best by held-out KD are saved.

    Args:
        declared: fingerprint of the params that define the run; with the inputs' and the code's
            it keys the state that a killed run resumes from.

    Raises:
        MismatchError: model, teacher, cache and tokens do not belong together.
        InputError: see :func:`lib.recover.lesson.make_lesson`.
        NonFiniteError: see :meth:`lib.train.loop.Trainer.run`.
        BusyError: another process trains the same run.
    """
    set_threads(run.threads)
    device = join(resolve_device(run.device))
    base = read_config(checkpoint)["fingerprint"]
    model, info = load_checkpoint(checkpoint)
    if "teacher" not in info:
        raise InputError(f"{checkpoint} does not say which teacher it comes from; make it anew")
    expect: dict[str, Any] = {"teacher": info["teacher"], "vocab_size": model.config.vocab_size}
    with_adapters(model, params)
    lesson = make_lesson(params, distill, folders, expect, device)
    identity = {
        **run_identity(params, declared, device),
        "base": base,
        **lesson.identity,
    }
    with scratch_folder(STAGE, fingerprint(identity)) as scratch:
        sets = (model, params, lesson.loss, lesson.train, lesson.val, device, scratch)
        tokens = params.batch_size * params.grad_accum * lesson.length
        config = params.model_dump(mode="json")
        try:
            trainer = Trainer(*sets, shard=run.shard)
            with reporting(STAGE, params.steps, out, run, config, tokens_per_step=tokens) as report:
                result = trainer.run(report)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{STAGE}: {error}; lower {STAGE}.rate, or check the model it starts from"
            ) from None
        progress = result.progress
        about = {
            "base": base,
            "teacher": info["teacher"],
            **lesson.identity,
            "params": declared,
            "code": identity["code"],
            "result": result_of(progress),
        }
        if is_main():
            save_adapter(result.model, out / "adapter", about)
            write_log(out, STAGE, progress, run.log_every)
    return progress
