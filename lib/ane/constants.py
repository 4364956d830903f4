"""Whether the stored LUTs, scale factors and magnitudes are what FP16 can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lib.model.linear import LutLinear
from lib.quant.fp16 import Fp16Facts, fp16_facts, round_to_fp16


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Stored tensors of all quantized layers.

    Attributes:
        layers: number of quantized layers.
        entries: LUT and scale entries looked at.
        subnormal: entries that are FP16 subnormals (some devices flush them to zero).
        faults: what is wrong, by layer, in words.
    """

    layers: int
    entries: int
    subnormal: int
    faults: dict[str, str]


def check_constants(layers: dict[str, LutLinear]) -> Constants:
    """Look at the values as stored (not as rounded in a forward pass): a snapped model passes."""
    faults: dict[str, str] = {}
    entries = subnormal = 0
    for name, layer in layers.items():
        tensors = {"LUT": fp16_facts(layer.lut)}
        for part, parameter in layer.scale.named_parameters():
            tensors[f"scale {part}"] = fp16_facts(parameter)
        problems = [problem for part, facts in tensors.items() for problem in _faults(part, facts)]
        if not problems and not torch.isfinite(round_to_fp16(layer.factors()[0])).all():
            problems.append("A * g passes 65504 and is infinite in FP16")
        repeated = tensors["LUT"].entries - tensors["LUT"].distinct
        if repeated:
            problems.append(f"LUT has {repeated} entries that are equal in FP16")
        if problems:
            faults[name] = "; ".join(problems)
        entries += sum(facts.entries for facts in tensors.values())
        subnormal += sum(facts.subnormal for facts in tensors.values())
    return Constants(layers=len(layers), entries=entries, subnormal=subnormal, faults=faults)


def _faults(part: str, facts: Fp16Facts) -> list[str]:
    found = []
    if facts.non_finite:
        found.append(f"{part} has {facts.non_finite} non-finite entries")
    if facts.inexact:
        found.append(f"{part} has {facts.inexact} entries that are not FP16 values")
    return found
