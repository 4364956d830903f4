"""sensitivity: how much each layer matters, before any training.

Usage: python -m stages.sensitivity TEACHER QUANTIZED CACHE OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.params.load import stage_params
from lib.sensitivity.run import sensitivity_stage


def main(teacher: Path, quantized: Path, cache: Path, out: Path) -> None:
    """Score every layer as the section `sensitivity` says."""
    params = stage_params("sensitivity")
    sensitivity_stage(
        teacher,
        quantized,
        cache,
        out,
        params=params.sensitivity,
        distill=params.distill,
        run=params.run,
    )


if __name__ == "__main__":
    run_stage(main)
