"""Snapping from folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.base.files import write_json
from lib.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from lib.model.size import folder_megabytes, model_size
from lib.snap.snap import snap_model


def snap_stage(checkpoint: Path, out: Path, *, baked: bool) -> dict[str, Any]:
    """Snap ``checkpoint`` and write ``out/model`` and ``out/metrics.json``; returns metrics.

    Sizes count everything: indices, LUTs, scales, magnitudes and the unquantized layers.

    Raises:
        InputError, GateError: see :func:`lib.snap.snap.snap_model`.
    """
    model, info = load_checkpoint(checkpoint)
    size = model_size(model)
    report = snap_model(model, baked=baked)
    info = {**info, "stage": "snap", "parent": read_config(checkpoint)["fingerprint"]}
    save_checkpoint(model, out / "model", tokenizer_from=checkpoint, info=info, half=True)
    metrics = {
        **report,
        "bits_per_weight": None if baked else size.bits_per_weight,
        "bits_per_quantized_weight": None if baked else size.bits_per_layer_weight,
        "megabytes": folder_megabytes(out / "model"),
    }
    write_json(out / "metrics.json", {"snap": metrics})
    return metrics
