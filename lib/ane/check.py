"""The FP16 gate: a snapped model computed as it would be deployed, compared with float32.

Forms: ``factored`` (rank by rank) and ``baked`` (one dense FP16 weight per layer), each with
rounding after every operation, prescaled norms, eager softmax and a finite mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib.ane.constants import Constants, check_constants
from lib.ane.emulate import (
    FIRST_OVERFLOW,
    MATMUL_LIMIT,
    Fp16Emulation,
    OpRecord,
    round_parameters,
)
from lib.ane.factored import factorize, restore
from lib.ane.norms import prescale_norms
from lib.base.errors import InputError, MismatchError
from lib.base.progress import track
from lib.distill.compare import Agreement
from lib.model.surgery import bake, projections, quantized_layers
from lib.quant.fp16 import FP16_MAX_SQUARABLE

MASK_VALUE = -1e4
"""Added to scores of future positions: finite in FP16, and exp() of it is zero."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a form may lose against float32: mean KL in nats, least share of equal top-1."""

    max_kl: float
    min_top1: float


@dataclass(kw_only=True)
class FormResult:
    """One form against float32, and what each operation of each module did.

    Attributes:
        kl, top1, perplexity: NaN where logits are not finite.
        non_finite_logits: number of NaN or infinite logits.
        non_finite_from: module that made the first NaN or infinity.
        errors: ``|y - y32| / |y32|`` of each projection's output on the first sequence.
        records: magnitudes by module and operation.
    """

    kl: float = math.nan
    top1: float = 0.0
    perplexity: float = math.nan
    non_finite_logits: int = 0
    non_finite_from: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    records: list[OpRecord] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A broken limit: where and why."""

    layer: str
    form: str
    why: str

    def __str__(self) -> str:
        return f"{self.layer} ({self.form}): {self.why}"


@dataclass(kw_only=True)
class CheckResult:
    """Everything the gate saw. ``norm_peaks`` is the largest |input| of each RMSNorm."""

    limits: Limits
    tokens: int
    reference_perplexity: float
    constants: Constants
    forms: dict[str, FormResult]
    norm_peaks: dict[str, float]
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Additive mask ``[1, 1, length, length]``, :data:`MASK_VALUE` at future positions."""
    future = torch.ones(length, length, device=device).triu(1)
    return (future * MASK_VALUE)[None, None]


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """``[L]`` token ids -> ``[L, V]``."""
    return model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]


class _Outputs:
    """Collects each projection's output of one forward pass, by hooks."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._handles = [
            layer.register_forward_hook(self._keep(name)) for name, layer in layers.items()
        ]

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.by_name[name] = output

        return hook

    def close(self) -> dict[str, Tensor]:
        for handle in self._handles:
            handle.remove()
        return self.by_name


def _relative_error(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).norm() / reference.norm().clamp_min(1e-30))


@dataclass(kw_only=True)
class _Reference:
    """Float32 results: logits ``[L, V]`` of each sequence, projections of the first one."""

    sequences: list[Tensor]
    logits: list[Tensor]
    outputs: dict[str, Tensor]


def _run_reference(
    model: PreTrainedModel, sequences: list[Tensor], names: Sequence[str]
) -> _Reference:
    logits: list[Tensor] = []
    outputs: dict[str, Tensor] = {}
    for ids in track(sequences, len(sequences), "float32"):
        collector = None if logits else _Outputs({n: model.get_submodule(n) for n in names})
        logits.append(_logits(model, ids, causal_mask(len(ids), ids.device)))
        if collector is not None:
            outputs = collector.close()
    return _Reference(sequences=sequences, logits=logits, outputs=outputs)


def _run_form(model: PreTrainedModel, reference: _Reference, form: str) -> FormResult:
    """Every sequence through ``model`` as it now is, rounding after every operation."""
    result = FormResult()
    agreement = Agreement()
    nll, predicted = 0.0, 0
    records: dict[tuple[str, str], OpRecord] = {}
    pairs = list(zip(reference.sequences, reference.logits, strict=True))
    for ids, expected in track(pairs, len(pairs), form):
        mask = causal_mask(len(ids), ids.device)
        collector = None
        if not result.errors:
            collector = _Outputs({n: model.get_submodule(n) for n in reference.outputs})
        with Fp16Emulation(model, constants=[mask]) as emulation:
            logits = _logits(model, ids, mask)
        if collector is not None:
            outputs = collector.close()
            result.errors = {
                name: _relative_error(outputs[name], value)
                for name, value in reference.outputs.items()
            }
        _merge(records, emulation.records)
        result.non_finite_from = result.non_finite_from or emulation.non_finite_from
        result.non_finite_logits += int((~torch.isfinite(logits)).sum())
        agreement.add(logits, expected)
        nll += float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        predicted += len(ids) - 1
    result.kl, result.top1 = agreement.kl, agreement.top1
    result.perplexity = perplexity_of(nll, predicted)
    result.records = list(records.values())
    return result


def perplexity_of(nll: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood; infinite where that overflows a float."""
    mean = nll / tokens
    return math.exp(mean) if mean < 700 else (math.nan if math.isnan(mean) else math.inf)


def _merge(total: dict[tuple[str, str], OpRecord], more: dict[tuple[str, str], OpRecord]) -> None:
    for key, record in more.items():
        known = total.setdefault(key, OpRecord(record.module, record.op))
        known.max_abs = max(known.max_abs, record.max_abs)
        known.overflows += record.overflows


@torch.no_grad()
def run_check(model: PreTrainedModel, sequences: Sequence[Tensor], limits: Limits) -> CheckResult:
    """Check a snapped model on token sequences (int64 ``[L]``, at least two tokens each).

    The model is used up: norms, layers and weights are replaced by their deployed forms.

    Raises:
        InputError: no sequence with two tokens.
        MismatchError: a token that the model does not have.
    """
    sequences = [ids for ids in sequences if len(ids) > 1]
    if not sequences:
        raise InputError("the ANE check needs a test sequence of at least 2 tokens; got none")
    known = int(model.config.vocab_size)
    largest = max(int(ids.max()) for ids in sequences)
    if largest >= known:
        raise MismatchError(
            f"the text has token {largest}, the model's vocabulary ends at {known - 1}; "
            "make tokens and model with one tokenizer (rerun stage tokens)"
        )
    model.eval()
    model.set_attn_implementation("eager")
    names = list(projections(model))
    reference = _run_reference(model, sequences, names)
    nll = sum(
        float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        for logits, ids in zip(reference.logits, sequences, strict=True)
    )
    layers = quantized_layers(model)
    constants = check_constants(layers)
    norms = prescale_norms(model)
    forms = {}
    if layers:
        originals = factorize(model, fp16=True)
        round_parameters(model)
        forms["factored"] = _run_form(model, reference, "factored")
        restore(model, originals)
        bake(model)
    round_parameters(model)
    forms["baked"] = _run_form(model, reference, "baked")
    predicted = sum(len(ids) - 1 for ids in sequences)
    result = CheckResult(
        limits=limits,
        tokens=predicted + len(sequences),
        reference_perplexity=perplexity_of(nll, predicted),
        constants=constants,
        forms=forms,
        norm_peaks={name: norm.peak for name, norm in norms.items()},
    )
    _judge(result)
    return result


def _judge(result: CheckResult) -> None:
    """Fill in failures and warnings."""
    for layer, why in result.constants.faults.items():
        result.failures.append(Failure(layer=layer, form="constants", why=why))
    for form, values in result.forms.items():
        result.failures += _failures(form, values, result.limits)
        for record in values.records:
            if record.is_matmul and MATMUL_LIMIT < record.max_abs < FIRST_OVERFLOW:
                result.warnings.append(
                    f"{record.module} ({form}): {record.op} reaches {record.max_abs:.0f}; some "
                    f"devices give infinity above {MATMUL_LIMIT:.0f}"
                )
    # "not <=" rather than ">": a NaN peak counts
    large = {n: peak for n, peak in result.norm_peaks.items() if not peak <= FP16_MAX_SQUARABLE}
    if large:
        worst = max(large, key=lambda name: large[name])
        result.warnings.append(
            f"{worst}: input reaches {large[worst]:.0f}; a plain x^2 RMSNorm would overflow above "
            f"{FP16_MAX_SQUARABLE:.0f} and stay silent, here and in {len(large) - 1} more of "
            f"{len(result.norm_peaks)} norms: deploy the prescaled form"
        )
    if result.constants.subnormal:
        result.warnings.append(
            f"{result.constants.subnormal} scale or LUT entries are FP16 subnormals; "
            "a device that flushes them reads zero"
        )


def _failures(form: str, values: FormResult, limits: Limits) -> list[Failure]:
    found = [
        Failure(
            layer=record.module or "the model",
            form=form,
            why=f"{record.op} reaches {record.max_abs:.6g}, above 65504: infinite in FP16",
        )
        for record in values.records
        if record.overflows
    ]
    if found:
        return found  # what follows from an overflow is not another fault
    if values.non_finite_logits or math.isnan(values.kl):
        layer = values.non_finite_from or "the model"
        why = f"{values.non_finite_logits} logits are not finite; the first NaN is made here"
        return [Failure(layer=layer, form=form, why=why)]
    worst = max(values.errors, key=lambda name: values.errors[name], default="the model")
    at = f"; the outputs differ most here (relative {values.errors.get(worst, math.nan):.2g})"
    if values.kl > limits.max_kl:
        why = f"KL {values.kl:.3g} from float32 is above max_kl {limits.max_kl:g}{at}"
        found.append(Failure(layer=worst, form=form, why=why))
    if values.top1 < limits.min_top1:
        why = f"top-1 agreement {values.top1:.4f} is below min_top1 {limits.min_top1:g}{at}"
        found.append(Failure(layer=worst, form=form, why=why))
    return found
