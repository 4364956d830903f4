"""What a package holds, against the model it was made from: bit for bit, and nothing beside it.

Broken packages can differ by little in their logits, so the constants themselves are compared: the
convolutions of a program stand in the order in which the graph runs them, and each must have its
layer's LUT and indices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lib.export.graph import DeployedDecoder, layer_name
from lib.export.interpret import constant_weight
from lib.export.layers import DenseConv, FactoredConv
from lib.export.package import Array, Function, Name, Operation, Package
from lib.model.limits import HEAD_SLICE, MAX_CHANNELS, MAX_RANK, MAX_SIDE

_WIDE = ("FLOAT32", "FLOAT64")
_SHARED = 100  # values; the converter keeps equal constants of so many, or more, once
_PARTS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


@dataclass(kw_only=True)
class Audit:
    """What was found.

    Attributes:
        faults: one line each; empty when the package is what it should be.
        layers: quantized layers found exact in the last function.
        dense: weights that are not quantized, found exact: the head's slices and what was baked.
        operations: how many of each kind, constants left out, all functions together.
        megabytes: 10^6 bytes in the weight file: ``layers`` (indices, LUTs, factors),
            ``embeddings`` (with the head) and ``total`` of the folder.
        bits_per_weight: of the quantized layers, everything counted.
    """

    faults: list[str] = field(default_factory=list)
    layers: int = 0
    dense: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)
    bits_per_weight: float | None = None


def audit_package(package: Package, decoder: DeployedDecoder) -> Audit:
    """Compare a package with the graph it was made from.

    Raises:
        CorruptError: the package cannot be read.
    """
    audit = Audit()
    counts: Counter[str] = Counter()
    if not package.functions:
        audit.faults.append("the package has no function")
    for name in package.functions:
        function = package.function(name)
        _check_weights(function, decoder, name, audit)
        _check_constants(function, decoder, name, audit.faults)
        _check_types(function, len(decoder.head), name, audit.faults)
        counts.update(o.kind for o in function.operations if o.kind != "const")
    audit.operations = dict(sorted(counts.items()))
    _check_sizes(package, decoder, audit)
    return audit


def _check_weights(function: Function, decoder: DeployedDecoder, name: str, audit: Audit) -> None:
    """Each convolution's weight against the one that the graph has in its place."""
    makers = {o.outputs[0].name: o for o in function.operations if o.outputs}
    weights = [
        makers.get(bound.name)
        for operation in function.operations
        if operation.kind == "conv" and isinstance(bound := operation.inputs["weight"][0], Name)
    ]
    expected = _convolutions(decoder)
    audit.layers = audit.dense = 0
    if len(weights) != len(expected):
        audit.faults.append(
            f"{name}: {len(weights)} convolutions, the model has {len(expected)} (projections and "
            "slices of the head)"
        )
        return
    for (layer, wanted), maker in zip(expected, weights, strict=True):
        if isinstance(wanted, FactoredConv):
            why = _difference(wanted, maker)
            audit.layers += not why
        else:
            why = _dense_difference(wanted, maker)
            audit.dense += not why
        if why:
            audit.faults.append(f"{name}: {layer}: {why}")


def _convolutions(decoder: DeployedDecoder) -> list[tuple[str, FactoredConv | Tensor]]:
    """Name and module (dense: weight) of every convolution, in the order they run."""
    found: list[tuple[str, FactoredConv | Tensor]] = []
    for number, block in enumerate(decoder.blocks):
        for part, names in _PARTS.items():
            for short in names:
                conv = block.get_submodule(f"{part}.{short}")
                assert isinstance(conv, FactoredConv | DenseConv)
                wanted = conv if isinstance(conv, FactoredConv) else conv.weight
                found.append((layer_name(number, part, short), wanted))
    return found + [(f"slice {n} of the head", part) for n, part in enumerate(decoder.head)]


def _difference(module: FactoredConv, maker: Operation | None) -> str:
    """Why a convolution's weight is not the layer's, or nothing."""
    if maker is None or maker.kind != "constexpr_lut_to_dense":
        kind = "an input" if maker is None else maker.kind
        return f"its weight is stored as {kind}, not as indices and a LUT"
    found = constant_weight(maker)
    if found is None:
        return "its weight has several LUTs"
    indices, lut = found
    wanted_lut = module.lut.numpy().astype(np.float16)
    wanted = module.indices.numpy()
    if lut.dtype != np.float16 or not _same(lut, wanted_lut):
        return f"its LUT is {lut.tolist()} instead of {wanted_lut.tolist()}"
    if indices.size != wanted.size:
        return f"it has {indices.size} indices instead of {wanted.size}"
    wrong = np.flatnonzero(indices.reshape(-1) != wanted.reshape(-1))
    if len(wrong):
        row, column = divmod(int(wrong[0]), wanted.shape[1])
        return f"{len(wrong)} indices differ, first at row {row}, column {column}"
    return ""


def _dense_difference(weight: Tensor, maker: Operation | None) -> str:
    if maker is None or maker.kind != "const":
        kind = "an input" if maker is None else maker.kind
        return f"its weight is stored as {kind}, not as FP16 values"
    if not _same(maker.attributes["val"], weight.numpy().astype(np.float16)):
        return "its weight has other values than the model's"
    return ""


def _check_constants(
    function: Function, decoder: DeployedDecoder, name: str, faults: list[str]
) -> None:
    """Factors, gains, biases, embeddings and rotary tables are among the program's constants."""
    stored = {
        value.tobytes()
        for operation in function.operations
        if isinstance(value := operation.attributes.get("val"), np.ndarray) and value.size > 1
    }
    quantized = {id(module.weight) for module in decoder.layers().values()}
    tables = {"rotary cosines": decoder.cosines, "rotary sines": decoder.sines}
    for place, value in (*decoder.named_parameters(), *tables.items()):
        if id(value) in quantized or value.numel() == 1 or bool((value == 1).all()):
            continue  # products with 1 are left out of the program
        if value.numpy().astype(np.float16).tobytes() not in stored:
            faults.append(f"{name}: {place} is not among the constants")


def _same(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def _check_types(function: Function, slices: int, name: str, faults: list[str]) -> None:
    """FP16, static and small enough everywhere; constants finite. The last ``slices`` convolutions
    are the head's."""
    head = [o.outputs[0].name for o in function.operations if o.kind == "conv"][-slices:]
    for operation in function.operations:
        for output in operation.outputs:
            where = f"{name}: {operation.kind} {output.name}"
            parameter = operation.kind == "const" and not output.shape  # such as an epsilon
            if output.dtype in _WIDE and not parameter:
                faults.append(f"{where} is {output.dtype}; the Neural Engine computes in FP16 only")
            if operation.kind.startswith("const"):
                continue
            if any(size <= 0 for size in output.shape):
                faults.append(f"{where} has no fixed shape")
            if len(output.shape) > MAX_RANK:
                faults.append(f"{where} has rank {len(output.shape)}, {MAX_RANK} is the most")
            sides, channels = output.shape[-2:], output.shape[1:2]
            if any(s > MAX_SIDE for s in sides) or any(c > MAX_CHANNELS for c in channels):
                faults.append(f"{where} of shape {list(output.shape)} is too large for one tensor")
            if output.name in head and output.shape[1] > HEAD_SLICE:
                faults.append(f"{where} makes {output.shape[1]} channels, more than {HEAD_SLICE}")
        value = operation.attributes.get("val")
        if (
            isinstance(value, np.ndarray)
            and value.dtype.kind == "f"
            and not np.isfinite(value).all()
        ):
            faults.append(f"{name}: constant {operation.outputs[0].name} is not finite")


def _factor_bytes(layers: Collection[FactoredConv]) -> int:
    """LUTs, factors and biases in FP16. What marks the inputs of group or channel scales is the
    same in many layers, and counted once."""
    own = sum(t.numel() for m in layers for t in (m.lut, m.a, m.bias) if t is not None)
    rows = [m.b for m in layers]
    shared = {(b.shape, hash(b.numpy().tobytes())): b.numel() for b in rows if b.numel() >= _SHARED}
    small = sum(b.numel() for b in rows if b.numel() < _SHARED)
    return 2 * (own + small + sum(shared.values()))


def _check_sizes(package: Package, decoder: DeployedDecoder, audit: Audit) -> None:
    """The weight file holds each constant once: no dense copy, tied embeddings not twice."""
    layers = decoder.layers().values()
    bits = [(len(m.lut) - 1).bit_length() for m in layers]
    packed = sum(-(-m.indices.numel() * b // 8) for m, b in zip(layers, bits, strict=True))
    factors = _factor_bytes(layers)
    own = {id(p): p.numel() for part in (decoder.embedding.slices, decoder.head) for p in part}
    quantized = {id(p) for m in layers for p in m.parameters()}
    rest = sum(
        p.numel() for p in decoder.parameters() if id(p) not in own and id(p) not in quantized
    ) + sum(b.numel() for b in (decoder.cosines, decoder.sines))
    embeddings = 2 * sum(own.values())
    expected = packed + factors + embeddings + 2 * rest
    stored = package.stored_bytes
    if stored > expected:
        audit.faults.append(
            f"the weight file has {stored} bytes, {stored - expected} more than the model's "
            f"constants need ({expected}): something is stored twice or dense"
        )
    weights = sum(m.indices.numel() for m in layers)
    total = sum(f.stat().st_size for f in package.folder.rglob("*") if f.is_file())
    audit.megabytes = {
        "layers": (packed + factors) / 1e6,
        "embeddings": embeddings / 1e6,
        "total": total / 1e6,
    }
    audit.bits_per_weight = 8 * (packed + factors) / weights if weights else None
