"""`lutqat report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lib.base.errors import InputError


def report(
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REV",
            help="Compare with a git revision, branch, tag or DVC experiment; nothing is "
            "checked out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("runs/report.html"),
) -> None:
    """Write one page on this experiment: results, curves, layers, samples, parameters.

    The page needs no network and no other file. What did not run is said in it.

    Example: lutqat report --against main
    """
    from lib.base.files import write_text
    from lib.report.experiment import read_experiment
    from lib.report.page import render
    from lib.report.source import revision, workspace

    root = Path()
    here = workspace(root)
    this = read_experiment(here)
    _check_out(out, this.outputs)
    other = None if against is None else read_experiment(revision(root, against))
    write_text(out, render(this, other))
    print(f"wrote {out}")


def _check_out(out: Path, outputs: list[str]) -> None:
    """Refuse to overwrite anything but a page, and to write into what DVC keeps.

    Raises:
        InputError: with the name that is in the way.
    """
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {out} is no HTML file; give a name that ends in .html")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a file in it")
    for path in outputs:
        if out.resolve().is_relative_to(Path(path).resolve()):
            raise InputError(
                f"--out {out} lies in {path}, which DVC keeps; give another place, such as "
                "runs/report.html"
            )
