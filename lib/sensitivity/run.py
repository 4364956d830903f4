"""The stage from folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lib.base.device import resolve_device, set_threads
from lib.cache.shards import CacheReader
from lib.model.checkpoint import load_checkpoint
from lib.model.load import load_causal_lm
from lib.model.surgery import quantized_layers
from lib.objective.distillation import make_objective
from lib.objective.lesson import cached_lesson
from lib.objective.loss import held_out_loss
from lib.params.data import Run
from lib.params.sensitivity import Sensitivity
from lib.params.training import Distill
from lib.sensitivity.fisher import drawn_rows, fisher_scores
from lib.sensitivity.given import block_names, given_scores
from lib.sensitivity.perturbation import perturbation_scores
from lib.sensitivity.report import write_report


def sensitivity_stage(
    teacher: Path,
    quantized: Path,
    cache: Path,
    out: Path,
    *,
    params: Sensitivity,
    distill: Distill,
    run: Run,
) -> dict[str, float]:
    """Score the teacher's layers; write scores.json, scores.svg and metrics.json into ``out``.

    An interrupted run keeps nothing and starts again.

    Args:
        quantized: checkpoint of the stage `quant`: the teacher quantized, untrained. Not opened
            with a file of scores.

    Returns:
        ``{layer name: score}``; by decoder block where a given file has no more.

    Raises:
        MismatchError: the cache, or the given file, is another teacher's.
        NonFiniteError: a loss or gradient is not finite; the layer is named.
        InputError: the given file is missing or unusable.
    """
    set_threads(run.threads)
    if params.method == "file":
        assert params.file is not None  # the schema sees to it
        model = load_causal_lm(teacher)
        scores = given_scores(Path(params.file), model)
    else:
        model, info = load_checkpoint(quantized)
        scores = _measured(model, info["teacher"], teacher, cache, params, distill, run)
    write_report(scores, len(block_names(model)), params.method, out)
    return scores


def _measured(
    quantized: PreTrainedModel,
    mark: str,
    teacher: Path,
    cache: Path,
    params: Sensitivity,
    distill: Distill,
    run: Run,
) -> dict[str, float]:
    """Scores by the method `fisher` or `perturbation`; ``mark`` is the teacher's fingerprint."""
    device = resolve_device(run.device)
    expect = {"teacher": mark, "vocab_size": quantized.config.vocab_size}
    terms: Any = {"temperature": distill.temperature, "target": distill.target}
    val = CacheReader(cache / "val", expect)
    quantized.to(device)  # type: ignore[arg-type]
    if params.method == "fisher":
        objective, cached = cached_lesson(CacheReader(cache / "train", expect), val, **terms)
        rows = drawn_rows(len(cached), params.batches, params.batch_size, params.seed)
        return fisher_scores(quantized, objective, cached, rows, params.beta, device)

    judge = make_objective(val, **terms)

    def measure(model: PreTrainedModel) -> float:
        return held_out_loss(model, judge, val, params.sequences, device)

    model = load_causal_lm(teacher)
    model.to(device)  # type: ignore[arg-type]
    return perturbation_scores(model, quantized_layers(quantized), measure)
