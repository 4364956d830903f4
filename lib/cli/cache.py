"""`lutqat cache`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

_WIDTH = 120  # columns where stdout is no terminal
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
    spec = reader.spec.to_json()
    return {
        "rows": f"{len(reader):,}",
        "predicted tokens": f"{figures['tokens']:,}",
        "bytes per token": figures["bytes_per_token"],
        "size": f"{size / 1e6:.1f} MB",
        "top-k mass": figures["topk_mass"],
        **{key: spec[key] for key in ("codec", "top_k", "negatives", "temperatures")},
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
