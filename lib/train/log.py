"""What a person and the tools see of a training run while it goes on."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lib.base.errors import InputError
from lib.base.files import write_json, write_text
from lib.base.workers import is_main
from lib.params.data import Run
from lib.train.loop import Report
from lib.train.state import Progress, rows_to_csv

Row = dict[str, float | int | None]


def evaluated(row: Row) -> bool:
    """Whether a held-out loss was measured after this step."""
    return any(key.startswith("val_") and row[key] is not None for key in row)


def logged_rows(progress: Progress, every: int) -> list[Row]:
    """The rows that log.csv holds: every ``every``-th step and all that were evaluated."""
    return [row for row in progress.rows if int(row["step"] or 0) % every == 0 or evaluated(row)]


def result_of(progress: Progress) -> dict[str, float | int]:
    """The outcome that metrics and checkpoint keep; no wall-clock, so equal runs are equal."""
    result: dict[str, float | int] = {
        "initial_kd": progress.initial_loss,
        "best_kd": progress.best_loss,
        "final_kd": progress.last_loss,
        "best_step": progress.best_step,
        "steps": progress.step,
    }
    pulled = [row for row in progress.rows if "prox_coefficient" in row]
    if pulled:  # the float model beside the one on its grid
        result["initial_soft_kd"] = pulled[0]["val_soft_kd_loss"] or 0.0
        result["final_soft_kd"] = pulled[-1]["val_soft_kd_loss"] or 0.0
        result["prox_coefficient"] = pulled[-1]["prox_coefficient"] or 0.0
    epochs = {row["block"]: row["epoch"] or 0.0 for row in progress.rows if "block" in row}
    if epochs:  # one block after the other: how far each was trained
        result["fewest_epochs"] = min(epochs.values())
        result["most_epochs"] = max(epochs.values())
    return result


def write_log(
    folder: Path,
    stage: str,
    progress: Progress,
    every: int,
    more: Mapping[str, float] | None = None,
) -> None:
    """Write log.csv and metrics.json of a stage, which keeps ``more`` beside the outcome."""
    write_text(folder / "log.csv", rows_to_csv(logged_rows(progress, every)))
    write_json(folder / "metrics.json", {stage: {**result_of(progress), **(more or {})}})


def _start_wandb(project: str, stage: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise InputError(
            f"run.wandb is {project!r} but the package wandb is not installed; "
            "`pip install wandb`, or set run.wandb to null"
        ) from None
    return wandb.init(project=project, name=stage, config=config)


@contextlib.contextmanager
def reporting(
    stage: str,
    steps: int,
    folder: Path,
    run: Run,
    config: dict[str, Any],
    *,
    tokens_per_step: int,
) -> Iterator[Report]:
    """A callback that moves the progress bar, rewrites the metrics whenever the held-out loss
    was measured (`dvc exp show` then has them mid-run), and feeds Weights & Biases if asked.
    Silent in all but the first of several processes."""
    if not is_main():
        yield lambda _progress: None
        return
    tracker = _start_wandb(run.wandb, stage, config) if run.wandb else None
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    started, first = time.monotonic(), -1
    with bar:
        task = bar.add_task(stage, total=steps, note="")

        def report(progress: Progress) -> None:
            nonlocal first
            row = progress.rows[-1]
            if first < 0:
                first = progress.step - 1  # resumed runs count only their own steps
            trained = (progress.step - first) * tokens_per_step
            rate = trained / max(time.monotonic() - started, 1e-9)
            note = f"loss {row['loss']:.4f}, held-out {progress.last_loss:.4f}, {rate:.0f} tokens/s"
            bar.update(task, completed=progress.step, note=note)
            logged = progress.step % run.log_every == 0
            if evaluated(row):
                write_log(folder, stage, progress, run.log_every)
            if bar.disable and (logged or progress.step == steps):
                print(f"{stage} {progress.step}/{steps}: {note}", file=sys.stderr, flush=True)
            if tracker is not None and logged:
                tracker.log({k: v for k, v in row.items() if v is not None}, step=progress.step)

        try:
            yield report
        finally:
            if tracker is not None:
                tracker.finish()
