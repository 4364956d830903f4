"""recover: LoRA adapters that win back what quantization lost, beside the finished model.

Usage: python -m stages.recover MODEL TEACHER CACHE TOKENS OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.files import write_json, write_text
from lib.base.stage import run_stage
from lib.model.adapter_files import write_untrained
from lib.params.load import stage_params


def main(checkpoint: Path, teacher: Path, cache: Path, tokens: Path, out: Path) -> None:
    """Train adapters as the section `recover` says; with 0 steps, say that there are none."""
    params = stage_params("recover")
    if not params.recover.steps:
        write_untrained(out / "adapter")
        write_text(out / "log.csv", "step,val_kd_loss\n")
        write_json(out / "metrics.json", {"recover": {"steps": 0}})
        return
    # only now: most runs have no adapters and need no torch here
    from lib.base.workers import start_workers
    from lib.recover.lesson import Folders
    from lib.recover.run import recover_stage

    if start_workers("recover", params.run.processes):
        return
    recover_stage(
        checkpoint,
        Folders(teacher=teacher, cache=cache, tokens=tokens),
        out,
        params=params.recover,
        distill=params.distill,
        run=params.run,
        declared=params.declared_fingerprint(),
    )


if __name__ == "__main__":
    run_stage(main)
