"""Does a package compute what the snapped model computes? Run without Core ML, on held-out text.

Three results for the same tokens: the snapped model in float32, the static graph on FP16 constants
(which says what those explain), and the package itself, interpreted. Package and graph have the
same constants, so nothing but the order of sums may lie between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.distill.compare import Agreement
from lib.export.graph import DeployedDecoder, step_inputs
from lib.export.interpret import Interpreter
from lib.export.package import Package

SUMMATION = 1e-4
"""Largest |package - graph| relative to the largest |logit|: float32 sums in another order leave
about 1e-6 to 1e-5 through thirty blocks."""


@dataclass(kw_only=True)
class LogitCheck:
    """Package against model on ``tokens`` positions.

    Attributes:
        largest: largest |logit| of the graph.
        from_graph: largest |package - graph|.
        from_model: largest |package - snapped model|.
        explained: largest |graph - snapped model|: what FP16 constants explain.
        kl: mean KL(snapped model || package), nats per token.
        top1: share of positions with the same prediction.
    """

    tokens: int
    largest: float
    from_graph: float
    from_model: float
    explained: float
    kl: float
    top1: float
    faults: list[str] = field(default_factory=list)


@torch.no_grad()
def model_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """``[N, V]`` float32 logits of a text."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@torch.no_grad()
def graph_logits(decoder: DeployedDecoder, ids: list[int], tokens: int) -> Tensor:
    """The same from the static graph: ``tokens`` at a time, the rest one by one."""
    cache = decoder.empty_cache()
    rows = []
    for start, count in calls(len(ids), tokens):
        given = step_inputs(ids[start : start + count], start, count, decoder.slots)
        *logits, keys, values = decoder(**given.named(), keys=cache[0], values=cache[1])
        cache = (keys, values)
        rows.append(_rows(logits))
    return torch.cat(rows)


def package_logits(
    package: Package, decoder: DeployedDecoder, ids: list[int], tokens: int
) -> Tensor:
    """The same from the package: ``prefill`` for ``tokens`` at a time, ``decode`` one by one.

    A package without state (one function ``main``) takes and gives the cache.
    """
    cache = dict(zip(("keys", "values"), decoder.empty_cache(), strict=True))
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
        parts = [results[f"logits_{number}"] for number in range(len(decoder.head))]
        rows.append(_rows(parts)[:count])
        cache = (
            dict(function.state)
            if stateful
            else {"keys": results["new_keys"], "values": results["new_values"]}
        )
    return torch.cat(rows)


def calls(length: int, tokens: int) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each call: whole prefills, then single tokens."""
    whole = length // tokens * tokens
    singles = [(start, 1) for start in range(whole, length)] if tokens > 1 else []
    return [(start, tokens) for start in range(0, whole, tokens)] + singles


def _rows(parts: list[Tensor]) -> Tensor:
    """Slices (1, V', 1, S) -> ``[S, V]``."""
    return torch.cat(parts, dim=1)[0, :, 0].T.float()


def check_logits(
    package: Package,
    decoder: DeployedDecoder,
    expected: Tensor,
    ids: list[int],
    *,
    tokens: int,
    max_kl: float,
) -> LogitCheck:
    """Run a package over ``ids`` and compare.

    Args:
        expected: :func:`model_logits` of the snapped model.
        max_kl: largest mean KL that is no fault, in nats per token.
    """
    graph = graph_logits(decoder, ids, tokens)
    found = package_logits(package, decoder, ids, tokens)
    agreement = Agreement()
    agreement.add(found, expected)
    check = LogitCheck(
        tokens=len(ids),
        largest=float(graph.abs().max()),
        from_graph=float((found - graph).abs().max()),
        from_model=float((found - expected).abs().max()),
        explained=float((graph - expected).abs().max()),
        kl=agreement.kl,
        top1=agreement.top1,
    )
    # "not <=" rather than ">": a NaN is a fault
    if not check.from_graph <= SUMMATION * check.largest:
        check.faults.append(
            f"logits differ by {check.from_graph:.3g} from the graph that the package was made "
            f"from; sums in another order explain {SUMMATION * check.largest:.3g}"
        )
    if not check.kl <= max_kl:
        check.faults.append(
            f"KL {check.kl:.3g} from the snapped model is above export.max_kl {max_kl:g}"
        )
    return check
