"""`lutqat plot`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

from lib.base.errors import CorruptError, InputError

_LOG = "log.csv"
_SERIES = ("kd_loss", "val_kd_loss")


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of training stages (or their log.csv files).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="SVG file to write.")] = Path("losses.svg"),
    log_scale: Annotated[bool, typer.Option("--log", help="Logarithmic losses.")] = False,
) -> None:
    """Draw loss curves: training (lines) and held-out (dots), as SVG.

    Example: lutqat plot runs/scales runs/weights runs/finetune --out losses.svg
    """
    curves = {_label(run): _read_log(run) for run in runs}
    from matplotlib.figure import Figure

    from lib.base.figures import write_svg

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for number, (name, series) in enumerate(curves.items()):
        color = f"C{number % 10}"
        axes.plot(*series["kd_loss"], color=color, alpha=0.5, linewidth=1)
        axes.plot(
            *series["val_kd_loss"], "o-", color=color, markersize=3, label=f"{name}, held out"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("distillation loss")
    if log_scale:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    write_svg(out, figure)
    print(f"wrote {out}")


def _label(run: Path) -> str:
    return (run.parent if run.suffix == ".csv" else run).name or str(run)


def _read_log(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """(steps, losses) of each series; empty cells are left out."""
    path = run if run.suffix == ".csv" else run / _LOG
    if not path.is_file():
        raise InputError(f"{path} does not exist; give folders of training stages (runs/scales)")
    series: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in _SERIES}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, (steps, losses) in series.items():
                    if row[name]:
                        steps.append(int(row["step"]))
                        losses.append(float(row[name]))
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise CorruptError(f"{path} is not the log of a training stage ({error})") from None
    if not series["val_kd_loss"][0]:
        raise InputError(f"{path} has no rows yet; wait for the first evaluation of the run")
    return series
