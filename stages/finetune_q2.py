"""finetune_q2: training after the conversion to fewer bits.

Usage: python -m stages.finetune_q2 CHECKPOINT CACHE TEACHER TOKENS OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.base.workers import start_workers
from lib.params.load import stage_params
from lib.train.run import start_from_checkpoint, train_stage
from lib.train.source import live_teacher


def main(checkpoint: Path, cache: Path, teacher: Path, tokens: Path, out: Path) -> None:
    """Train a checkpoint as the section `finetune_q2` says."""
    params = stage_params("finetune_q2")
    if start_workers("finetune_q2", params.run.processes):
        return
    train_stage(
        "finetune_q2",
        start_from_checkpoint(checkpoint),
        cache,
        out,
        params=params.finetune_q2,
        distill=params.distill,
        run=params.run,
        tokenizer_from=checkpoint,
        declared=params.declared_fingerprint(),
        live=live_teacher(params.distill, teacher, tokens),
    )


if __name__ == "__main__":
    run_stage(main)
