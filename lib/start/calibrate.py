"""Stage calibrate, from folder to folder: how the teacher uses its layers' inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lib.base.device import resolve_device, set_threads
from lib.base.files import code_fingerprint, fingerprint, write_json
from lib.base.scratch import scratch_folder
from lib.model.calibrate import input_moments
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.model.moments import write_moments
from lib.params.data import Run
from lib.quant.spec import Moments
from lib.text.sequences import TokenSet

MOMENTS = "moments.safetensors"


def calibrate_stage(
    teacher: Path, tokens: Path, out: Path, *, sequences: int, needed: Moments, run: Run
) -> dict[str, Any]:
    """Write ``out/moments.safetensors`` and ``out/metrics.json``; returns metrics.

    A killed run resumes where its sums were last kept.

    Args:
        tokens: the training split; its first ``sequences`` rows are read.
        needed: what of the inputs is wanted; with NONE the teacher is not run.

    Raises:
        NonFiniteError: see :func:`lib.model.calibrate.input_moments`.
    """
    set_threads(run.threads)
    device = resolve_device(run.device)
    rows = TokenSet(tokens).first(sequences if needed is not Moments.NONE else 0)
    info: dict[str, Any] = {
        "teacher": folder_fingerprint(teacher),
        "tokens": rows.meta["fingerprint"],
        "sequences": len(rows),
        "moments": needed.value,
    }
    key = fingerprint({**info, "code": code_fingerprint(), "device": device.type})
    with scratch_folder("calibrate", key) as scratch:
        moments = {}
        if len(rows):
            model = load_causal_lm(teacher)
            model.to(device)  # type: ignore[arg-type]
            ids = torch.tensor(rows.input_ids, dtype=torch.int64)
            lengths, full = torch.tensor(rows.lengths), needed is Moments.PRODUCTS
            kept = scratch / "sums.safetensors"
            moments = input_moments(model, ids, lengths, full=full, resume=kept)
        write_moments(out / MOMENTS, moments, info)
    metrics = {
        "moments": needed.value,
        "sequences": len(rows),
        "tokens": int(rows.lengths.sum()),
        "megabytes": (out / MOMENTS).stat().st_size / 1e6,
    }
    write_json(out / "metrics.json", {"calibrate": metrics})
    return metrics
