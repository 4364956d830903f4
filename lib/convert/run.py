"""The conversion from folder to folder, with what it cost in held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lib.base.device import resolve_device, set_threads
from lib.base.errors import MismatchError
from lib.base.files import write_json
from lib.cache.shards import CacheReader
from lib.convert.convert import convert_by_reference_rule, convert_model
from lib.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.model.moments import open_moments
from lib.model.surgery import has_masters, projections, quantized_layers
from lib.objective.distillation import make_objective
from lib.objective.loss import held_out_loss
from lib.params.data import Run
from lib.params.specs import target_spec
from lib.params.training import Convert, Distill


def _load(checkpoint: Path) -> tuple[PreTrainedModel, dict[str, Any], bool]:
    model, info = load_checkpoint(checkpoint)
    layers = list(quantized_layers(model).values())
    if layers and not has_masters(model):
        raise MismatchError(
            f"{checkpoint} is snapped; convert the checkpoint that it was snapped from"
        )
    return model, info, all(layer.spec.ste_fp16 for layer in layers)


def _teacher_weights(folder: Path, info: dict[str, Any], checkpoint: Path) -> dict[str, Tensor]:
    """Weights of the teacher's projections.

    Raises:
        MismatchError: the checkpoint was made from another teacher.
    """
    if (found := folder_fingerprint(folder)) != info.get("teacher"):
        raise MismatchError(
            f"{checkpoint} was made from teacher {info.get('teacher')}, and {folder} is {found}; "
            "set convert.source to trained, or run the stages before it again"
        )
    layers = projections(load_causal_lm(folder))
    return {n: m.weight.detach() for n, m in layers.items() if isinstance(m.weight, Tensor)}


def convert_stage(
    checkpoint: Path,
    teacher: Path,
    cache: Path,
    moments: Path,
    out: Path,
    *,
    params: Convert,
    distill: Distill,
    run: Run,
    declared: str,
) -> dict[str, Any]:
    """Convert ``checkpoint`` and write ``out/model`` and ``out/metrics.json``; returns metrics.

    The held-out KD loss is measured before, after, and after what the reference
    implementation's rule makes of the same checkpoint.

    Args:
        teacher: not opened where the layers' present weights are converted.
        moments: file of the stage `calibrate`; not opened where the params need none.
        declared: fingerprint of the params that define the run.

    Raises:
        MismatchError: teacher, cache or moments are another teacher's, or the checkpoint is
            snapped.
        InputError, ParamsError: see :func:`lib.convert.convert.convert_model`.
    """
    set_threads(run.threads)
    device = resolve_device(run.device)
    model, info, ste_fp16 = _load(checkpoint)
    expect = {"teacher": info.get("teacher"), "vocab_size": model.config.vocab_size}
    val = CacheReader(cache / "val", expect)
    objective = make_objective(val, temperature=distill.temperature, target=distill.target)
    spec = target_spec(params, ste_fp16)
    used = open_moments(moments, teacher=info.get("teacher", ""), spec=spec)
    weights = None
    if params.source == "teacher":
        weights = _teacher_weights(teacher, info, checkpoint)

    def measure(candidate: PreTrainedModel) -> float:
        return held_out_loss(candidate, objective, val, params.eval_sequences, device)

    rival, _, _ = _load(checkpoint)
    rival.to(device)  # type: ignore[arg-type]
    convert_by_reference_rule(rival, spec)
    reference = measure(rival)
    del rival
    model.to(device)  # type: ignore[arg-type]
    before = measure(model)
    counts = convert_model(model, spec, used, weights)
    metrics = {
        "kd_before": before,
        "kd_after": measure(model),
        "kd_reference_rule": reference,
        **counts,
    }
    info = {
        "stage": "convert",
        "teacher": info.get("teacher"),
        "parent": read_config(checkpoint)["fingerprint"],
        "moments": used.info["fingerprint"] if used else None,
        "params": declared,
        "result": metrics,
    }
    save_checkpoint(model.cpu(), out / "model", tokenizer_from=checkpoint, info=info)
    write_json(out / "metrics.json", {"convert": metrics})
    return metrics
