"""quant: the teacher quantized, before any training.

Usage: python -m stages.quant TEACHER MOMENTS OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.params.load import stage_params
from lib.params.specs import model_spec
from lib.start.quantize import quant_stage


def main(teacher: Path, moments: Path, out: Path) -> None:
    """Quantize the teacher as the section `quant` says."""
    params = stage_params("quant")
    quant_stage(
        teacher,
        moments,
        out,
        spec=model_spec(params.quant),
        run=params.run,
        declared=params.declared_fingerprint(),
    )


if __name__ == "__main__":
    run_stage(main)
