"""Training on a cache of 100,000 sequences: time until the first batch, and memory.

    python -m benchmarks.cache_start

Caches of 1,000, 10,000 and 100,000 rows share their shards (made-up numbers, small rows). Each is
opened in processes of its own, in turns: imports, opening, the first epoch's order and the first
batch are timed, then peak memory is read after so many batches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import machine, save
from benchmarks.rivals import peak_memory

SIZES = (1_000, 10_000, 100_000)
SHARD, LENGTH, TOP_K, NEGATIVES = 64, 32, 64, 64
MEGABYTE = 1e6


def write_caches(place: Path) -> float:
    """``place/ROWS`` for each size, the smaller ones as links; returns the bytes of a row."""
    import numpy as np

    from lib.cache.shards import write_index, write_shard
    from lib.cache.spec import CacheSpec

    spec = CacheSpec(
        teacher="made-up",
        tokenizer="none",
        tokens="none",
        split="train",
        vocab_size=49_152,
        max_length=LENGTH,
        top_k=TOP_K,
        negatives=NEGATIVES,
        temperatures=(1.0, 2.0),
        seed=0,
    )
    generator = np.random.default_rng(0)
    block: dict[str, Any] = {}
    for name, (dtype, shape) in spec.columns().items():
        full = (SHARD, *shape)
        ids = generator.integers(0, spec.vocab_size, full)
        block[name] = (ids if dtype == np.int32 else -generator.random(full)).astype(dtype)
    block["length"][:] = LENGTH
    most = SIZES[-1]
    largest = place / str(most)
    largest.mkdir()
    entries = []
    for number, first in enumerate(range(0, most, SHARD)):
        rows = min(SHARD, most - first)
        part = {name: values[:rows] for name, values in block.items()}
        entries.append(write_shard(largest, number, spec, first, part))
    write_index(largest, spec, most, entries)
    for size in SIZES[:-1]:
        folder = place / str(size)
        folder.mkdir()
        count = size // SHARD  # whole shards
        for entry in entries[:count]:
            os.link(largest / entry.file, folder / entry.file)
        write_index(folder, spec, count * SHARD, entries[:count])
    return spec.bytes_per_token() * LENGTH


def measure(folder: Path, batches: int, batch_size: int) -> dict[str, Any]:
    """One start of training, in this very process."""
    begun = time.perf_counter()
    from lib.cache.shards import CacheReader
    from lib.train.schedule import rows_of

    imported, cpu = time.perf_counter(), time.process_time()
    before = peak_memory()
    reader = CacheReader(folder, {"teacher": "made-up"})
    opened = time.perf_counter()
    rows = rows_of(0, batch_size, len(reader), seed=0)
    ordered = time.perf_counter()
    reader.batch(rows)
    first, cpu = time.perf_counter(), time.process_time() - cpu
    for number in range(1, batches):
        reader.batch(rows_of(number, batch_size, len(reader), seed=0))
    last = time.perf_counter()
    return {
        "rows": len(reader),
        "import_s": imported - begun,
        "open_s": opened - imported,
        "order_s": ordered - opened,
        "batch_s": first - ordered,
        "first_batch_s": first - imported,
        "first_batch_cpu_s": cpu,
        "later_batch_s": (last - first) / max(1, batches - 1),
        "imported_bytes": before,
        "peak_bytes": peak_memory(),
    }


def in_a_process(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a fresh one."""
    numbers = [str(options.batches), str(options.batch_size)]
    command = [sys.executable, "-m", "benchmarks.cache_start", "--measure", str(folder), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarize(samples: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians over the rounds."""

    def median(size: int, key: str) -> float:
        return statistics.median(sample[key] for sample in samples[str(size)])

    least, most = SIZES[0], SIZES[-1]
    return {
        "first_batch_s": median(most, "first_batch_s"),
        "first_batch_cpu_s": median(most, "first_batch_cpu_s"),
        "open_s": median(most, "open_s"),
        "order_s": median(most, "order_s"),
        "import_s": median(most, "import_s"),
        "later_batch_s": median(most, "later_batch_s"),
        **{f"peak_mb_{size}": median(size, "peak_bytes") / MEGABYTE for size in SIZES},
        "peak_growth_mb": (median(most, "peak_bytes") - median(least, "peak_bytes")) / MEGABYTE,
    }


def main() -> None:
    """Write the caches, measure each in turns, delete them, write ``results/cache_start.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None, help="where 2 GB may be written")
    options = parser.parse_args()
    on = machine()
    samples: dict[str, list[dict[str, Any]]] = {str(size): [] for size in SIZES}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        row_bytes = write_caches(Path(temporary))
        for _ in range(options.rounds):
            for size in SIZES:
                sample = in_a_process(Path(temporary) / str(size), options)
                samples[str(size)].append(sample)
                print(size, {key: round(value, 4) for key, value in sample.items()}, flush=True)
    config = {key: value for key, value in vars(options).items() if key != "folder"}
    shape = {"shard": SHARD, "length": LENGTH, "top_k": TOP_K, "negatives": NEGATIVES}
    save(
        "cache_start",
        config={**config, **shape, "row_bytes": row_bytes},
        samples=samples,
        summary=summarize(samples),
        on=on,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        place, batches, batch_size = sys.argv[2:]
        print(json.dumps(measure(Path(place), int(batches), int(batch_size))))
    else:
        main()
