"""weights: scales frozen, the weights learn, through a straight-through estimator or as floats.

Usage: python -m stages.weights CHECKPOINT CACHE TEACHER TOKENS SCORES OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.stage import run_stage
from lib.base.workers import start_workers
from lib.params.load import stage_params
from lib.train.method import by_block
from lib.train.prox import penalty_of
from lib.train.run import start_from_checkpoint, train_stage
from lib.train.source import live_teacher


def main(
    checkpoint: Path, cache: Path, teacher: Path, tokens: Path, scores: Path, out: Path
) -> None:
    """Train a checkpoint as the section `weights` says."""
    params = stage_params("weights")
    if start_workers("weights", params.run.processes):
        return
    train_stage(
        "weights",
        start_from_checkpoint(checkpoint),
        cache,
        out,
        params=params.weights,
        distill=params.distill,
        run=params.run,
        tokenizer_from=checkpoint,
        declared=params.declared_fingerprint(),
        live=live_teacher(params.distill, teacher, tokens),
        by_block=by_block(
            params.weights.method, teacher, scores, params.layerwise, params.blockwise
        ),
        penalty=penalty_of(params.weights.regularizer, params.prox),
        grid_atol=params.prox.atol,
    )


if __name__ == "__main__":
    run_stage(main)
