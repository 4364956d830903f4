"""`lutqat inspect`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from lib.cli.options import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table
    from torch import Tensor

    from lib.model.linear import LutLinear

_LISTED = 4  # LUTs of so many entries are written out, larger ones as a range
_WIDTH = 120  # columns where stdout is no terminal


def inspect(checkpoint: Checkpoint) -> None:
    """Show what a checkpoint holds: layers, bits, LUTs, ranges of the scales, size, origin.

    Example: lutqat inspect runs/snap/model
    """
    from rich.console import Console

    from lib.model.folders import load_any
    from lib.model.size import model_size
    from lib.model.surgery import quantized_layers

    model, info = load_any(checkpoint)
    layers = quantized_layers(model)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if layers:
        console.print(_layer_table(layers))
    size = model_size(model)
    facts: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": f"{size.weights:,}",
        "quantized layers": len(layers),
    }
    if size.bits_per_layer_weight is not None:
        facts["bits per quantized weight"] = f"{size.bits_per_layer_weight:.3f}"
    facts["bits per weight, all in"] = f"{size.bits_per_weight:.3f}"
    facts["size when packed"] = f"{size.megabytes:.1f} MB"
    console.print(_fact_table({**facts, **_origin(checkpoint, info)}))


def _layer_table(layers: dict[str, LutLinear]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "shape", "bits", "rank", "form", "LUT", "scales S"):
        table.add_column(
            name, no_wrap=True, justify="right" if name in ("bits", "rank") else "left"
        )
    for name, layer in layers.items():
        a, b = layer.factors()
        table.add_row(
            name,
            f"{layer.out_features} x {layer.in_features}",
            str(layer.spec.bits),
            str(layer.spec.rank_of(layer.in_features)),
            layer.spec.scale.value + (" (snapped)" if layer.weight is None else ""),
            _levels(layer.levels()),
            _span(a @ b),
        )
    return table


def _levels(lut: Tensor) -> str:
    values = lut.tolist()
    if len(values) <= _LISTED:
        return " ".join(f"{value:.4g}" for value in values)
    return f"{values[0]:.4g} .. {values[-1]:.4g} ({len(values)})"


def _span(values: Tensor) -> str:
    return f"{float(values.min()):.3g} .. {float(values.max()):.3g}"


def _origin(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """File size, stage, result and fingerprints."""
    from lib.model.checkpoint import read_config
    from lib.model.load import folder_fingerprint
    from lib.model.size import folder_megabytes

    facts: dict[str, Any] = {"folder": f"{folder_megabytes(folder):.1f} MB in {os.fspath(folder)}"}
    if not info:
        return {**facts, "stage": "teacher", "fingerprint": folder_fingerprint(folder)}
    facts["stage"] = info.get("stage", "unknown")
    facts["fingerprint"] = read_config(folder)["fingerprint"]
    for key, value in info.items():
        if isinstance(value, dict):
            facts.update({f"{key} {name}": _shown(inner) for name, inner in value.items()})
        elif key != "stage":
            facts[key] = _shown(value)
    return facts


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _fact_table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
