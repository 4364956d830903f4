"""ane_check: the FP16 gate; fails the pipeline with the layer's name when a limit is broken.

Usage: python -m stages.ane_check MODEL TOKENS OUT
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lib.ane.check import run_check
from lib.ane.norms import NormForm
from lib.ane.products import Mode
from lib.ane.report import write_report
from lib.ane.spec import CheckSpec, Limits, Remedy
from lib.base.device import resolve_device, set_threads
from lib.base.errors import GateError
from lib.base.stage import run_stage
from lib.model.checkpoint import load_checkpoint
from lib.params.load import stage_params
from lib.text.sequences import TokenSet


def main(checkpoint: Path, tokens: Path, out: Path) -> None:
    """Check the model on validation sequences; the report is written whatever it says."""
    params = stage_params("ane_check")
    wanted = params.ane_check
    set_threads(params.run.threads)
    device = resolve_device(params.run.device)
    model, _ = load_checkpoint(checkpoint)
    texts = TokenSet(tokens / "val")
    order = np.random.default_rng(wanted.seed).permutation(len(texts.lengths))
    sequences = [
        torch.tensor(texts.input_ids[row][: texts.lengths[row]], dtype=torch.int64, device=device)
        for row in order[: wanted.sequences]
    ]
    spec = CheckSpec(
        limits=Limits(max_kl=wanted.max_kl, min_top1=wanted.min_top1),
        modes=tuple(Mode(mode) for mode in wanted.modes),
        norm=NormForm(wanted.norm),
        remedy=Remedy(wanted.remedy),
        partial_inputs=wanted.partial_inputs,
        partial_tokens=wanted.partial_tokens,
    )
    result = run_check(model.to(device), sequences, spec)
    write_report(result, out)
    if result.failures and wanted.gate == "fail":
        more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
        raise GateError(
            f"ane_check: {result.failures[0]}{more}; see {out / 'report.md'}, or set "
            "ane_check.gate=warn to go on"
        )


if __name__ == "__main__":
    run_stage(main)
