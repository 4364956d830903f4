"""calibrate: how much, and how together, the teacher uses the inputs of each layer.

Usage: python -m stages.calibrate TEACHER TOKENS OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.params.load import stage_params
from lib.params.specs import moments_needed
from lib.start.calibrate import calibrate_stage


def main(teacher: Path, tokens: Path, out: Path) -> None:
    """Measure what the starts of `quant` and `convert` ask for; nothing if both are max-abs."""
    params = stage_params("calibrate")
    calibrate_stage(
        teacher,
        tokens / "train",
        out,
        sequences=params.calibrate.sequences,
        needed=moments_needed(params.quant.init, params.convert.init),
        run=params.run,
    )


if __name__ == "__main__":
    run_stage(main)
