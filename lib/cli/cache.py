"""`lutqat cache`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lib.base.errors import InputError
from lib.cli.options import Device

_WIDTH = 120  # columns where stdout is no terminal
_ONLY = {
    "topk": ("top_k", "negatives", "temperatures"),
    "sampled": ("samples", "sample_temperature", "sample_power"),
}


class Codec(StrEnum):
    """How the new cache is stored."""

    RAW = "raw"
    PACKED = "packed"


Cache = Annotated[
    Path,
    typer.Argument(
        help="The cache's folder (data/cache), or one split of it (data/cache/train).",
        show_default=False,
    ),
]


def cache_info(cache: Cache) -> None:
    """Show what a teacher cache holds: its spec, rows, bytes per token, top-k mass, fingerprints.

    Example: lutqat cache info data/cache
    """
    from rich.console import Console
    from rich.table import Table

    from lib.cache.verify import cache_folders

    facts = {place.name: _facts(place) for place in cache_folders(cache)}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", style="bold", no_wrap=True)
    for name in facts:
        table.add_column(name, overflow="fold")
    for key in next(iter(facts.values())):
        table.add_row(key, *(str(column[key]) for column in facts.values()))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def _facts(folder: Path) -> dict[str, Any]:
    """What the table says about one split."""
    from lib.cache.shards import CacheReader
    from lib.capture.build import cache_statistics

    reader, figures = CacheReader(folder), cache_statistics(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    spec: dict[str, Any] = {"targets": "topk", **reader.spec.to_json()}
    other = "sampled" if spec["targets"] == "topk" else "topk"
    spec |= dict.fromkeys(_ONLY[other], "-")
    return {
        "rows": f"{len(reader):,}",
        "predicted tokens": f"{figures['tokens']:,}",
        "bytes per token": figures["bytes_per_token"],
        "size": f"{size / 1e6:.1f} MB",
        "targets": spec["targets"],
        "top-k mass": figures.get("topk_mass", "-"),
        "mass of the samples": figures.get("sampled_mass", "-"),
        "codec": spec["codec"],
        **{key: spec[key] for names in _ONLY.values() for key in names},
        "level_bits": spec["level_bits"] if spec["codec"] == "packed" else "-",
        **{key: spec[key] for key in ("max_length", "vocab_size", "seed", "split")},
        **{key: spec[key] for key in ("teacher", "tokenizer", "tokens")},
        "spec's fingerprint": reader.spec.fingerprint,
        "content": reader.fingerprint,
    }


def cache_verify(cache: Cache) -> None:
    """Read a teacher cache whole: checksums, fingerprints, ranges of ids, finite numbers.

    Ends with exit code 5 and one line on the first fault.

    Example: lutqat cache verify data/cache
    """
    from lib.cache.verify import verify

    rows = verify(cache)
    print(f"{cache} is whole: {rows:,} rows")


def cache_import(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder with the .pt shards of the reference implementation.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder to write: train and val.", show_default=False)
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of the teacher that made the shards.", show_default=False),
    ] = None,
    codec: Annotated[Codec, typer.Option(help="How the cache is stored.")] = Codec.RAW,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the sequences held out.")
    ] = 0.05,
    device: Device = "auto",
) -> None:
    """Make a teacher cache of the reference implementation into one of ours.

    Its files hold logits of a few tokens without the sum over the vocabulary, so no probabilities.
    Therefore sequences are imported, each once, and the teacher runs over them again; it must agree
    with the files' top k.

    Example: lutqat cache import kd_cache imported --teacher data/teacher
    """
    if teacher is None:
        raise InputError(
            f"{folder} holds logits without their sum over the vocabulary, so no probabilities can "
            "be had from it alone; give the teacher that made it: --teacher FOLDER"
        )
    from lib.base.device import resolve_device
    from lib.cache.shards import INDEX
    from lib.capture.imported import import_cache

    foreign = out.exists() and not (out / "train" / INDEX).is_file()
    if foreign and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no cache; give a new folder")
    done = import_cache(
        folder,
        out,
        teacher,
        codec=codec.value,
        val_fraction=val_fraction,
        device=resolve_device(device),
    )
    print(
        f"{done.train:,} train and {done.val:,} val sequences; dropped: {done.duplicates:,} "
        f"duplicates, {done.short:,} of a single token"
    )
    limit = f"{done.limit:.3g} allowed"
    print(f"largest KL of a file's top k: {done.kl:.3g} nats per position ({limit})")
    print(f"wrote {out}; `lutqat cache info {out}` shows it")
