"""Running a model as it would be deployed, and the float32 run that it is compared with.

Forms: ``factored`` (rank by rank) and ``baked`` (one dense FP16 weight per layer), each with
rounding after every operation, deployed norms, eager softmax and a finite mask.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib.ane.emulate import Fp16Emulation, OpRecord, largest_magnitude
from lib.ane.factored import factorize, restore
from lib.ane.graph import GraphLog
from lib.ane.norms import deploy_norms
from lib.ane.products import MATMUL_LIMIT, Mode
from lib.ane.spec import CheckSpec
from lib.base.progress import track
from lib.distill.compare import Agreement
from lib.model.norms import rms_gain
from lib.model.surgery import bake, projections, quantized_layers
from lib.quant.fp16 import MASK_VALUE, round_to_fp16


@dataclass(kw_only=True)
class FormResult:
    """One form in one mode against float32, and what each operation of each module did.

    Attributes:
        tokens: tokens that were run; ``reference_perplexity`` is that of float32 on them.
        kl, top1, perplexity: NaN where logits are not finite.
        non_finite_logits: number of NaN or infinite logits.
        non_finite_from: module that made the first NaN or infinity.
        errors: ``|y - y32| / |y32|`` of each projection's output on the first sequence.
        records: magnitudes by module and operation.
        norm_inputs: largest |input| of each RMSNorm.
        graph: what operations ran.
        same_as: the mode whose result this is, where running another one would change nothing.
    """

    tokens: int = 0
    reference_perplexity: float = math.nan
    kl: float = math.nan
    top1: float = 0.0
    perplexity: float = math.nan
    non_finite_logits: int = 0
    non_finite_from: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    records: list[OpRecord] = field(default_factory=list)
    norm_inputs: dict[str, float] = field(default_factory=dict)
    graph: GraphLog = field(default_factory=GraphLog)
    same_as: Mode | None = None


Forms = dict[str, dict[Mode, FormResult]]
"""Results by form and mode."""

FACTORED = "factored"
BAKED = "baked"


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Additive mask ``[1, 1, length, length]``, :data:`MASK_VALUE` at future positions."""
    future = torch.ones(length, length, device=device).triu(1)
    return (future * MASK_VALUE)[None, None]


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """``[L]`` token ids -> ``[L, V]``."""
    return model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]


def perplexity_of(nll: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood; infinite where that overflows a float."""
    mean = nll / tokens
    return math.exp(mean) if mean < 700 else (math.nan if math.isnan(mean) else math.inf)


def _nll(logits: Tensor, ids: Tensor) -> float:
    """Summed negative log-likelihood of every token but the first."""
    return float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))


@contextlib.contextmanager
def _hooked(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_outputs(model: nn.Module, names: Sequence[str], kept: dict[str, Tensor]) -> list[Any]:
    """Hooks that put each module's output into ``kept``."""

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name] = output

        return hook

    return [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]


def _watch(model: nn.Module, norms: dict[str, float], written: dict[str, float]) -> list[Any]:
    """Hooks that keep the largest |input| of each RMSNorm and |output| of each projection."""

    def keep(peaks: dict[str, float], name: str, value: Tensor) -> None:
        peaks[name] = max(peaks.get(name, 0.0), largest_magnitude(value))

    handles: list[Any] = []
    for name, module in model.named_modules():
        if rms_gain(module) is not None:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, given, name=name: keep(norms, name, given[0])
                )
            )
    for name, layer in projections(model).items():
        handles.append(
            layer.register_forward_hook(lambda *got, name=name: keep(written, name, got[2]))
        )
    return handles


@dataclass(kw_only=True)
class Reference:
    """Float32 results.

    Attributes:
        sequences: token ids ``[L]``.
        logits: ``[L, V]`` of each sequence.
        outputs: of each projection, on the first sequence.
        norms: largest |input| of each RMSNorm.
        written: largest |output| of each projection.
    """

    sequences: list[Tensor]
    logits: list[Tensor] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)

    @property
    def perplexity(self) -> float:
        pairs = zip(self.logits, self.sequences, strict=True)
        return perplexity_of(sum(_nll(*pair) for pair in pairs), self.predicted)

    @property
    def predicted(self) -> int:
        """Tokens that have another before them."""
        return self.tokens - len(self.sequences)

    def first(self, tokens: int) -> Reference:
        """The first tokens of the first sequence: later ones change nothing before them."""
        return replace(
            self,
            sequences=[self.sequences[0][:tokens]],
            logits=[self.logits[0][:tokens]],
            outputs={},
        )


def run_reference(model: PreTrainedModel, sequences: list[Tensor]) -> Reference:
    """Every sequence through the model as it is, in float32."""
    reference = Reference(sequences=sequences)
    names = list(projections(model))
    with _hooked(_watch(model, reference.norms, reference.written)):
        for ids in track(sequences, len(sequences), "float32"):
            wanted = [] if reference.logits else names
            with _hooked(_keep_outputs(model, wanted, reference.outputs)):
                logits = _logits(model, ids, causal_mask(len(ids), ids.device))
            reference.logits.append(logits)
    return reference


def _run(
    model: PreTrainedModel, reference: Reference, spec: CheckSpec, mode: Mode, label: str
) -> FormResult:
    """Every sequence of ``reference`` through ``model`` as it now is, with rounding."""
    masks = [causal_mask(len(ids), ids.device) for ids in reference.sequences]
    emulation = Fp16Emulation(
        model,
        masks,
        mode=mode,
        partial_inputs=spec.partial_inputs,
        inputs_of=reference.norms.keys(),
    )
    agreement = Agreement()
    nll, bad = 0.0, 0
    errors: dict[str, float] = {}
    runs = list(zip(reference.sequences, reference.logits, masks, strict=True))
    for ids, expected, mask in track(runs, len(runs), label):
        outputs: dict[str, Tensor] = {}
        wanted = [] if errors else list(reference.outputs)
        with _hooked(_keep_outputs(model, wanted, outputs)), emulation:
            logits = _logits(model, ids, mask)
        for name, output in outputs.items():
            errors[name] = _relative_error(output, reference.outputs[name])
        agreement.add(logits, expected)
        nll += _nll(logits, ids)
        bad += int((~torch.isfinite(logits)).sum())
    return FormResult(
        tokens=reference.tokens,
        reference_perplexity=reference.perplexity,
        kl=agreement.kl,
        top1=agreement.top1,
        perplexity=perplexity_of(nll, reference.predicted),
        non_finite_logits=bad,
        non_finite_from=emulation.non_finite_from,
        errors=errors,
        records=list(emulation.records.values()),
        norm_inputs=emulation.input_peaks,
        graph=emulation.graph,
    )


def _relative_error(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).norm() / reference.norm().clamp_min(1e-30))


def _run_modes(
    model: PreTrainedModel, reference: Reference, spec: CheckSpec, form: str
) -> dict[Mode, FormResult]:
    """Every mode that is asked for, ``wide`` first.

    ``bounded`` differs from ``wide`` only behind a product that passes the limit: where there is
    none, it is not run again.
    """
    results: dict[Mode, FormResult] = {}
    for mode in sorted(spec.modes, key=list(Mode).index):
        if mode is Mode.BOUNDED and not passes_bound(results[Mode.WIDE]):
            results[mode] = replace(results[Mode.WIDE], same_as=Mode.WIDE)
            continue
        part = reference.first(spec.partial_tokens) if mode is Mode.PARTIAL else reference
        results[mode] = _run(model, part, spec, mode, f"{form}, {mode}")
    return results


def passes_bound(result: FormResult) -> bool:
    """Whether a matrix product reached what some devices turn into infinity."""
    return any(r.is_matmul and r.max_abs > MATMUL_LIMIT for r in result.records)


def run_forms(model: PreTrainedModel, reference: Reference, spec: CheckSpec) -> Forms:
    """The factored form (where layers are quantized) and the baked one, in every mode.

    The model is afterwards what it was.
    """
    forms: Forms = {}
    with _deployed_norms(model, spec), _rounded(model):
        if quantized_layers(model):
            with _factored(model):
                forms[FACTORED] = _run_modes(model, reference, spec, FACTORED)
        with _baked(model):
            forms[BAKED] = _run_modes(model, reference, spec, BAKED)
    return forms


@contextlib.contextmanager
def _deployed_norms(model: nn.Module, spec: CheckSpec) -> Iterator[None]:
    originals = deploy_norms(model, spec.norm)
    try:
        yield
    finally:
        restore(model, originals)


@contextlib.contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Every floating parameter rounded to FP16: what a deployed graph stores."""
    kept: list[tuple[Tensor, Tensor]] = []
    for parameter in model.parameters():
        rounded = round_to_fp16(parameter)
        if not torch.equal(rounded, parameter):
            kept.append((parameter, parameter.clone()))
            parameter.copy_(rounded)
    try:
        yield
    finally:
        for changed, before in kept:
            changed.copy_(before)


@contextlib.contextmanager
def _factored(model: nn.Module) -> Iterator[None]:
    originals = factorize(model, fp16=True)
    try:
        yield
    finally:
        restore(model, originals)


@contextlib.contextmanager
def _baked(model: nn.Module) -> Iterator[None]:
    originals = quantized_layers(model)
    bake(model)
    for name in originals:
        weight = model.get_parameter(f"{name}.weight")
        weight.copy_(round_to_fp16(weight))
    try:
        yield
    finally:
        restore(model, originals)
