"""From what was measured to failures, which stop the pipeline, and warnings, which do not.

Modes ``wide`` and ``bounded`` are judged; ``partial`` is pessimistic and only warns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from lib.ane.constants import Constants
from lib.ane.emulate import FIRST_OVERFLOW, OpRecord
from lib.ane.forms import FACTORED, FormResult, Forms
from lib.ane.graph import Fact, Status
from lib.ane.norms import SQUARE, NormForm
from lib.ane.products import MATMUL_LIMIT, Mode
from lib.ane.spec import CheckSpec, Limits
from lib.model.rescale import ResidualStream
from lib.quant.fp16 import FP16_MAX_SQUARABLE

PRESCALED = "the prescaled norm (ane_check.norm: prescaled)"
ALPHA = "a smaller residual stream (ane_check.remedy: alpha)"


class Kind(StrEnum):
    """What sort of limit is broken."""

    CONSTANT = "constant"
    OVERFLOW = "overflow"
    NON_FINITE = "non-finite"
    DIFFERENCE = "difference"
    GRAPH = "graph"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A broken limit: where, why, and what helps.

    Attributes:
        layer: module (or the fact of the graph); ``form``: factored, baked, constants or graph.
        mode: None where no mode was run.
        remedy: empty where none is known.
    """

    layer: str
    form: str
    kind: Kind
    why: str
    mode: Mode | None = None
    remedy: str = ""

    def __str__(self) -> str:
        where = self.form if self.mode is None else f"{self.form}, {self.mode}"
        remedy = f"; remedy: {self.remedy}" if self.remedy else ""
        return f"{self.layer} ({where}): {self.why}{remedy}"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judges the forms of one model.

    Attributes:
        stream: the residual stream, None where it is not known.
        quantized: names of the layers that the factored form computes rank by rank.
    """

    spec: CheckSpec
    stream: ResidualStream | None
    quantized: frozenset[str]

    def failures(self, constants: Constants, forms: Forms, facts: Iterable[Fact]) -> list[Failure]:
        """Every broken limit, in the order of the report."""
        found = [
            Failure(layer=layer, form="constants", kind=Kind.CONSTANT, why=why)
            for layer, why in constants.faults.items()
        ]
        for form, modes in forms.items():
            known: set[tuple[str, str]] = set()  # overflows that a milder mode has as well
            for mode, result in modes.items():
                if mode is Mode.PARTIAL or result.same_as is not None:
                    continue
                found += self._of_form(form, mode, result, known)
        found += [
            Failure(layer=fact.name, form="graph", kind=Kind.GRAPH, why=fact.found)
            for fact in facts
            if fact.status is Status.BROKEN
        ]
        return found

    def _of_form(
        self, form: str, mode: Mode, result: FormResult, known: set[tuple[str, str]]
    ) -> list[Failure]:
        overflows = [record for record in result.records if record.overflows]
        if overflows:  # what follows from an overflow is not another fault
            new = [r for r in overflows if (r.module, r.op) not in known]
            known.update((r.module, r.op) for r in overflows)
            return [self._overflow(form, mode, record, result) for record in new]
        if result.non_finite_logits or math.isnan(result.kl):
            why = f"{result.non_finite_logits} logits are not finite; the first NaN is made here"
            layer = result.non_finite_from or "the model"
            return [Failure(layer=layer, form=form, mode=mode, kind=Kind.NON_FINITE, why=why)]
        worst = worst_error(result)
        return [
            Failure(layer=worst, form=form, mode=mode, kind=Kind.DIFFERENCE, why=why)
            for why in differences(result, self.spec.limits)
        ]

    def _overflow(self, form: str, mode: Mode, record: OpRecord, result: FormResult) -> Failure:
        module = record.module
        scaled = self._is_scaled(form, record)
        peak = result.norm_inputs.get(module)
        if peak is not None and record.op == SQUARE and self.spec.norm is NormForm.PLAIN:
            why = (
                f"largest |input| {peak:.6g}: its square is infinite in FP16 above "
                f"{FP16_MAX_SQUARABLE:.1f}, and a plain norm silently gives zeros"
            )
            remedy = f"{PRESCALED} or {ALPHA}" if scaled else PRESCALED
        else:
            why = f"{record.op} reaches {record.max_abs:.6g}, "
            if record.max_abs >= FIRST_OVERFLOW:
                why += "above 65504: infinite in FP16"
            else:
                why += f"above {MATMUL_LIMIT:.0f}: infinite on some devices"
            remedy = f"{ALPHA}, with {PRESCALED}" if scaled else ""
        return Failure(
            layer=module or "the model",
            form=form,
            mode=mode,
            kind=Kind.OVERFLOW,
            why=why,
            remedy=remedy,
        )

    def _is_scaled(self, form: str, record: OpRecord) -> bool:
        """Whether alpha makes the results of an operation smaller.

        Of a norm that reads the stream only the square is; what it returns stays. Rank by rank
        alpha is in the factor A, which comes after the matrix product.
        """
        module = record.module
        if self.stream is None or module not in self.stream:
            return False
        if module in self.stream.readers:
            return record.op == SQUARE
        return not (form == FACTORED and record.is_matmul and module in self.quantized)

    def warnings(self, constants: Constants, forms: Forms) -> list[str]:
        """What is worth knowing and breaks no limit."""
        found = []
        for form, modes in forms.items():
            if Mode.BOUNDED not in modes:
                found += _above_bound(form, modes[Mode.WIDE])
            if Mode.PARTIAL in modes:
                found += self._partial(form, modes[Mode.PARTIAL])
        if self.spec.norm is NormForm.PRESCALED:
            found += _large_norms(norm_peaks(forms))
        if constants.subnormal:
            found.append(
                f"{constants.subnormal} scale or LUT entries are FP16 subnormals; "
                "a device that flushes them reads zero"
            )
        return found

    def _partial(self, form: str, result: FormResult) -> list[str]:
        """Mode ``partial`` against the same limits."""
        if result.non_finite_logits or math.isnan(result.kl):
            layer = result.non_finite_from or "the model"
            whys = [f"the first infinity or NaN is made in {layer}"]
        else:
            whys = differences(result, self.spec.limits)
        return [f"{form}, partial sums ({result.tokens} tokens): {why}" for why in whys]


def differences(result: FormResult, limits: Limits) -> list[str]:
    """How a form that stays finite breaks the limits on its logits."""
    worst = worst_error(result)
    at = ""
    if worst in result.errors:
        at = f"; the outputs differ most here (relative {result.errors[worst]:.2g})"
    found = []
    if result.kl > limits.max_kl:
        found.append(f"KL {result.kl:.3g} from float32 is above max_kl {limits.max_kl:g}{at}")
    if result.top1 < limits.min_top1:
        found.append(f"top-1 agreement {result.top1:.4f} is below min_top1 {limits.min_top1:g}{at}")
    return found


def worst_error(result: FormResult) -> str:
    """The projection whose output differs most from float32."""
    return max(result.errors, key=lambda name: result.errors[name], default="the model")


def norm_peaks(forms: Forms) -> dict[str, float]:
    """Largest |input| of each norm in any form, mode ``wide``."""
    peaks: dict[str, float] = {}
    for modes in forms.values():
        for name, peak in modes[Mode.WIDE].norm_inputs.items():
            peaks[name] = max(peaks.get(name, 0.0), peak)
    return peaks


def _above_bound(form: str, result: FormResult) -> list[str]:
    return [
        f"{record.module} ({form}): {record.op} reaches {record.max_abs:.0f}; some devices give "
        f"infinity above {MATMUL_LIMIT:.0f}"
        for record in result.records
        if record.is_matmul and MATMUL_LIMIT < record.max_abs < FIRST_OVERFLOW
    ]


def _large_norms(peaks: dict[str, float]) -> list[str]:
    large = {name: peak for name, peak in peaks.items() if peak > FP16_MAX_SQUARABLE}
    if not large:
        return []
    worst = max(large, key=lambda name: large[name])
    return [
        f"{worst}: input reaches {large[worst]:.0f}; a plain x^2 RMSNorm would overflow above "
        f"{FP16_MAX_SQUARABLE:.0f} and stay silent, here and in {len(large) - 1} more of "
        f"{len(peaks)} norms: deploy the prescaled form"
    ]
