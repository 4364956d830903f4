"""`lutqat merge-adapter`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lib.base.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from lib.recover.merge import Moved

_WIDTH = 120  # columns where stdout is no terminal


def merge_adapter(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="The snapped checkpoint it was trained on.", show_default=False),
    ],
    adapter: Annotated[
        Path, typer.Argument(help="Adapter folder (runs/recover/adapter).", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.", show_default=False)],
    refit_scales: Annotated[
        bool,
        typer.Option("--refit-scales", help="Refit scales and indices to the merged weights."),
    ] = False,
) -> None:
    """Merge a recovery adapter into the indices of the model, if enough of it arrives.

    W = W_q + (alpha / r) B A gets the nearest level of every weight. Shown per layer: how many
    indices move, which share of the wanted change that is, and the squared error left, relative to
    that of leaving the adapter out. Where less than half of the change arrives nothing is written.

    Example: lutqat merge-adapter runs/snap/model runs/recover/adapter merged --refit-scales
    """
    from rich.console import Console

    from lib.base.files import sha256_file
    from lib.model.adapter import check_base, load_adapter
    from lib.model.adapter_files import WEIGHTS
    from lib.model.checkpoint import load_checkpoint, read_config, save_checkpoint
    from lib.model.folders import check_replaceable
    from lib.recover.merge import check_arrived, merge_adapters, overall

    check_replaceable(out)
    if out.resolve() == checkpoint.resolve():
        raise InputError(f"{out} is the source itself; give another folder")
    parent = read_config(checkpoint)["fingerprint"]
    check_base(adapter, checkpoint)
    model, info = load_checkpoint(checkpoint)
    load_adapter(model, adapter)
    rows = merge_adapters(model, refit_scales=refit_scales)
    total = overall(rows)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(_table({**rows, "all layers": total}))
    check_arrived(total, refit_scales=refit_scales)
    kept = {"weights": sha256_file(adapter / WEIGHTS), "refit_scales": refit_scales}
    info = {**info, "parent": parent, "merged_adapter": kept}
    save_checkpoint(model, out, tokenizer_from=checkpoint, info=info, half=True)
    print(f"wrote {out}; `lutqat inspect {out}` shows it")


def _table(rows: dict[str, Moved]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "indices", "moved", "change arrived", "error left"):
        table.add_column(name, no_wrap=True, justify="left" if name == "layer" else "right")
    for name, row in rows.items():
        table.add_row(
            name, f"{row.weights:,}", f"{row.moved:,}", f"{row.share:.1%}", f"{row.error:.3f}"
        )
    return table
