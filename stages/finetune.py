"""finetune: weights and scales learn together, at a low rate.

Usage: python -m stages.finetune CHECKPOINT CACHE TEACHER TOKENS OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.base.workers import start_workers
from lib.params.load import stage_params
from lib.train.run import start_from_checkpoint, train_stage
from lib.train.source import live_teacher


def main(checkpoint: Path, cache: Path, teacher: Path, tokens: Path, out: Path) -> None:
    """Train a checkpoint as the section `finetune` says."""
    params = stage_params("finetune")
    if start_workers("finetune", params.run.processes):
        return
    train_stage(
        "finetune",
        start_from_checkpoint(checkpoint),
        cache,
        out,
        params=params.finetune,
        distill=params.distill,
        run=params.run,
        tokenizer_from=checkpoint,
        declared=params.declared_fingerprint(),
        live=live_teacher(params.distill, teacher, tokens),
    )


if __name__ == "__main__":
    run_stage(main)
