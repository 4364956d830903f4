"""The FP16 gate: a snapped model computed as it would be deployed, compared with float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.ane.constants import Constants, check_constants
from lib.ane.forms import Forms, Reference, run_forms, run_reference
from lib.ane.graph import Fact, graph_facts
from lib.ane.judge import Failure, Judge, Kind, norm_peaks
from lib.ane.norms import NormForm
from lib.ane.products import MATMUL_LIMIT, Mode
from lib.ane.spec import CheckSpec, Remedy
from lib.base.errors import InputError, MismatchError
from lib.model.rescale import ResidualStream, choose_alpha, residual_stream, scale_residual
from lib.model.surgery import quantized_layers
from lib.quant.fp16 import FP16_MAX, FP16_MAX_SQUARABLE, round_to_fp16

MARGIN = 2.0
"""How far below a limit alpha brings what the check has seen: other text may reach higher."""


@dataclass(kw_only=True)
class Applied:
    """What the remedy did.

    Attributes:
        alpha: factor of the residual stream; 1 where none was found.
        unscaled: results without it.
        before, after: failures without and with it.
        note: what is to be known about it, in words.
    """

    alpha: float
    unscaled: Forms
    before: list[Failure]
    after: list[Failure]
    note: str


@dataclass(kw_only=True)
class CheckResult:
    """Everything the gate saw; with a remedy that was applied, of the model that it left.

    Attributes:
        tokens: tokens checked; ``reference_perplexity`` is that of float32 on them.
        remedy: None where none was asked for or needed.
    """

    spec: CheckSpec
    tokens: int
    reference_perplexity: float
    constants: Constants
    forms: Forms
    facts: list[Fact]
    failures: list[Failure]
    warnings: list[str]
    remedy: Applied | None = None
    norm_peaks: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.norm_peaks = norm_peaks(self.forms)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def alpha(self) -> float:
        """Factor of the residual stream of the model that was judged."""
        return 1.0 if self.remedy is None else self.remedy.alpha


@torch.no_grad()
def run_check(model: PreTrainedModel, sequences: Sequence[Tensor], spec: CheckSpec) -> CheckResult:
    """Check a snapped model on token sequences (int64 ``[L]``, at least two tokens each).

    Afterwards the model is what it was, but for eager attention and an alpha that was applied.

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
    check = _Check(model, run_reference(model, sequences), spec)
    result = check.run()
    if spec.remedy is Remedy.ALPHA and any(f.kind is Kind.OVERFLOW for f in result.failures):
        return check.run_scaled(result)
    return result


class _Check:
    """A model, its float32 run, and what is asked of it."""

    def __init__(self, model: PreTrainedModel, reference: Reference, spec: CheckSpec) -> None:
        self._model = model
        self._reference = reference
        self._spec = spec
        self._constants = check_constants(quantized_layers(model))  # as stored, without alpha
        self._stream: ResidualStream | None = None
        self._unknown_stream = ""
        try:
            self._stream = residual_stream(model)
        except InputError as error:
            self._unknown_stream = str(error)

    def run(self) -> CheckResult:
        """The model as it is now."""
        forms = run_forms(self._model, self._reference, self._spec)
        log = next(iter(forms.values()))[Mode.WIDE].graph
        facts = graph_facts(self._model, log)
        quantized = frozenset(quantized_layers(self._model))
        judge = Judge(spec=self._spec, stream=self._stream, quantized=quantized)
        return CheckResult(
            spec=self._spec,
            tokens=self._reference.tokens,
            reference_perplexity=self._reference.perplexity,
            constants=self._constants,
            forms=forms,
            facts=facts,
            failures=judge.failures(self._constants, forms, facts),
            warnings=judge.warnings(self._constants, forms),
        )

    def run_scaled(self, before: CheckResult) -> CheckResult:
        """The model once more with its residual stream scaled, where that can help."""
        alpha, note = self._alpha()
        after = before
        if alpha < 1:
            scale_residual(self._model, alpha)
            assert self._stream is not None
            for name in self._stream.writers:
                self._reference.outputs[name] *= alpha  # what is added is smaller as well
            note = self._lost()
            after = self.run()
        after.remedy = Applied(
            alpha=alpha,
            unscaled=before.forms,
            before=before.failures,
            after=after.failures,
            note=note,
        )
        return after

    def _alpha(self) -> tuple[float, str]:
        """(alpha, or 1; why it is 1)."""
        if self._stream is None:
            return 1.0, self._unknown_stream
        square = FP16_MAX_SQUARABLE if self._spec.norm is NormForm.PLAIN else FP16_MAX
        product = MATMUL_LIMIT if Mode.BOUNDED in self._spec.modes else FP16_MAX
        reference = self._reference
        try:
            alpha = min(
                choose_alpha([reference.norms[n] for n in self._stream.readers], square / MARGIN),
                choose_alpha(
                    [reference.written[n] for n in self._stream.writers], product / MARGIN
                ),
            )
        except ValueError as error:  # float32 itself is not finite
            return 1.0, str(error)
        note = "the residual stream is within its limits: what overflows is not scaled by alpha"
        return alpha, note if alpha == 1 else ""

    def _lost(self) -> str:
        """What alpha costs: constants that it moves into FP16's subnormals."""
        lost = sum(int((round_to_fp16(p) != p).sum()) for p in self._model.parameters())
        return f"{lost} constants lose bits, being FP16 subnormals with alpha"
