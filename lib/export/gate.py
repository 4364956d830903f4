"""Does a package compute what the snapped model computes? Run without Core ML, on held-out text.

The package is interpreted in float32 on the FP16 constants that it holds. The model is run twice:
as it is, and with its constants rounded as a package rounds them. The package must give the latter
up to the order of sums: what FP16 constants explain, and nothing else, lies between it and the
former.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.distill.compare import Agreement
from lib.export.graph import DeployedDecoder, cache_of, join_logits, step_inputs
from lib.export.interpret import Interpreter
from lib.export.package import Package
from lib.model.linear import LowRankScale
from lib.model.surgery import quantized_layers
from lib.quant.fp16 import round_to_fp16

SUMMATION = 1e-4
"""Largest difference, relative to the largest |logit|, that float32 sums in another order explain:
through thirty blocks they leave 1e-6 to 1e-5."""


@dataclass(kw_only=True)
class LogitCheck:
    """Logits of an exported model on ``tokens`` positions.

    Attributes:
        largest: largest |logit| of the snapped model.
        from_model: largest difference from the snapped model.
        explained: largest difference that FP16 constants make in the model itself; None where the
            export computes in FP16, so that nothing finer than ``kl`` can be asked.
        unexplained: largest difference from the model on those constants.
        kl: mean KL(snapped model || export), nats per token.
        top1: share of positions with the same prediction.
    """

    tokens: int
    largest: float
    from_model: float
    explained: float | None = None
    unexplained: float | None = None
    kl: float
    top1: float
    faults: list[str] = field(default_factory=list)


@torch.no_grad()
def model_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """``[N, V]`` float32 logits of a text."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@contextlib.contextmanager
def fp16_constants(model: PreTrainedModel) -> Iterator[None]:
    """The model with every constant that a package stores rounded to FP16, while the block runs.

    The snapped model's parameters are FP16 already. What a package rounds beside them: the
    magnitudes multiplied into A, the rotary tables, the scaling of the scores, and the root of eps.
    """
    undo: list[tuple[nn.Module, str, Any]] = []

    def change(module: nn.Module, name: str, value: Any) -> None:
        undo.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def rounded(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> Any:
        return tuple(round_to_fp16(table) for table in output)

    handles = []
    for layer in quantized_layers(model).values():
        a, b = layer.factors()
        change(layer, "scale", LowRankScale(round_to_fp16(a), round_to_fp16(b)))
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            handles.append(module.register_forward_hook(rounded))
        if isinstance(getattr(module, "scaling", None), float):
            change(module, "scaling", _rounded(module.scaling))  # type: ignore[arg-type]
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                change(module, name, _rounded(getattr(module, name) ** 0.5) ** 2)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, name, value in undo:
            setattr(module, name, value)


def _rounded(value: float) -> float:
    return float(round_to_fp16(torch.tensor(value)))


def package_logits(
    package: Package, decoder: DeployedDecoder, ids: list[int], tokens: int
) -> Tensor:
    """``[N, V]`` from a package: ``prefill`` for ``tokens`` at a time, ``decode`` one by one.

    A package without state (one function ``main``) takes and gives the cache.
    """
    cache = decoder.cache_inputs()
    stateful = "prefill" in package.functions
    rows = []
    loaded: tuple[str, Interpreter] | None = None
    for start, count in calls(len(ids), tokens):
        name = "main" if not stateful else "prefill" if count == tokens else "decode"
        if loaded is None or loaded[0] != name:
            loaded = None  # one function's constants in memory at a time
            loaded = (name, Interpreter(package.function(name), cache))
        function = loaded[1]
        size = tokens if not stateful else count
        inputs = step_inputs(ids[start : start + count], start, size, decoder.slots).named()
        results = function.run(inputs if stateful else {**inputs, **cache})
        rows.append(join_logits(results)[:count])
        cache = dict(function.state) if stateful else cache_of(results)
    return torch.cat(rows)


def calls(length: int, tokens: int) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each call: whole prefills, then single tokens."""
    whole = length // tokens * tokens
    singles = [(start, 1) for start in range(whole, length)] if tokens > 1 else []
    return [(start, tokens) for start in range(0, whole, tokens)] + singles


def compare(found: Tensor, expected: Tensor, *, max_kl: float, name: str) -> LogitCheck:
    """Logits ``[N, V]`` of an export against the snapped model's.

    Args:
        max_kl: largest mean KL that is no fault, in nats per token.
        name: the export, for the fault.
    """
    agreement = Agreement()
    agreement.add(found, expected)
    check = LogitCheck(
        tokens=len(expected),
        largest=float(expected.abs().max()),
        from_model=float((found - expected).abs().max()),
        kl=agreement.kl,
        top1=agreement.top1,
    )
    if not check.kl <= max_kl:  # "not <=" rather than ">": a NaN is a fault
        check.faults.append(
            f"{name}: KL {check.kl:.3g} from the snapped model is above export.max_kl {max_kl:g}"
        )
    return check


def check_package(
    package: Package,
    decoder: DeployedDecoder,
    model: PreTrainedModel,
    expected: Tensor,
    ids: list[int],
    *,
    tokens: int,
    max_kl: float,
) -> LogitCheck:
    """Interpret a Core ML package on ``ids`` and compare.

    Args:
        model: what the graph was made from.
        expected: logits of the snapped model, before any remedy was applied to it.
    """
    found = package_logits(package, decoder, ids, tokens)
    check = compare(found, expected, max_kl=max_kl, name="Core ML")
    with fp16_constants(model):
        constants = model_logits(model, ids)
    check.explained = float((constants - expected).abs().max())
    check.unexplained = float((found - constants).abs().max())
    if not check.unexplained <= SUMMATION * check.largest:
        check.faults.append(
            f"Core ML: logits differ by {check.unexplained:.3g} from the snapped model's on FP16 "
            f"constants; sums in another order explain {SUMMATION * check.largest:.3g}"
        )
    return check
