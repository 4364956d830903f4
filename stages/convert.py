"""convert: fewer LUT entries and a higher rank (Q4 -> Q2), indices and scales refitted.

Usage: python -m stages.convert CHECKPOINT TEACHER CACHE MOMENTS OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.convert.run import convert_stage
from lib.params.load import stage_params


def main(checkpoint: Path, teacher: Path, cache: Path, moments: Path, out: Path) -> None:
    """Convert a checkpoint and report the held-out loss beside the reference rule's."""
    params = stage_params("convert")
    convert_stage(
        checkpoint,
        teacher,
        cache,
        moments,
        out,
        params=params.convert,
        distill=params.distill,
        run=params.run,
        declared=params.declared_fingerprint(),
    )


if __name__ == "__main__":
    run_stage(main)
