"""snap: the deployable form: packed indices, FP16 LUTs and scales, no master weights.

Usage: python -m stages.snap CHECKPOINT OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.params.load import stage_params
from lib.snap.run import snap_stage


def main(checkpoint: Path, out: Path) -> None:
    """Snap a trained checkpoint and count its bits."""
    params = stage_params("snap")
    snap_stage(checkpoint, out, baked=params.snap.form == "baked")


if __name__ == "__main__":
    run_stage(main)
