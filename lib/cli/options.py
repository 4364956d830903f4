"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint folder (runs/STAGE/model: trained, snapped or baked) or a teacher "
        "folder (data/teacher).",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[
    float,
    typer.Option(
        min=0.0, help="0: always the most probable token; above: drawn, the higher the freer."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
