"""scales: indices frozen, the scales learn to undo what rounding did.

Usage: python -m stages.scales CHECKPOINT CACHE TEACHER TOKENS SCORES OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.base.workers import start_workers
from lib.params.load import stage_params
from lib.train.method import by_block
from lib.train.run import start_from_checkpoint, train_stage
from lib.train.source import live_teacher


def main(
    checkpoint: Path, cache: Path, teacher: Path, tokens: Path, scores: Path, out: Path
) -> None:
    """Train a checkpoint as the section `scales` says."""
    params = stage_params("scales")
    if start_workers("scales", params.run.processes):
        return
    train_stage(
        "scales",
        start_from_checkpoint(checkpoint),
        cache,
        out,
        params=params.scales,
        distill=params.distill,
        run=params.run,
        tokenizer_from=checkpoint,
        declared=params.declared_fingerprint(),
        live=live_teacher(params.distill, teacher, tokens),
        by_block=by_block(
            params.scales.method, teacher, scores, params.layerwise, params.blockwise
        ),
    )


if __name__ == "__main__":
    run_stage(main)
