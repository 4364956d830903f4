"""Codec packed against codec raw: bytes per token, error, tokens per second, share of a step.

    python -m benchmarks.cache_codec

The teachers are made up, with logits that fall like a power of the rank, at the vocabularies of
SmolLM2 and Qwen3, their ranks spread over the vocabulary at random (the hardest case) or crowded at
small ids, and the real one whose raw cache `dvc repro` left in data/cache. Errors are
T^2 KL(exact || decoded) in nats per position, mean over all of them; speed is that of the last
teacher at top-64.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import machine, save
from benchmarks.teachers import columns_of, packed_spec, zipf_logits
from lib.cache.codec import decode, encode
from lib.cache.layout import record_bytes
from lib.cache.shards import CacheReader, write_index, write_shard
from lib.cache.spec import CacheSpec, negative_mask
from lib.distill.losses import kd_candidates, kd_tail

DATA = Path(__file__).parents[1] / "data" / "cache" / "train"
SIZES = ((64, 6), (64, 5), (50, 5), (50, 3))  # top k and level bits
BATCH, LENGTH = 4, 128
Columns = dict[str, np.ndarray]


def made_up(vocab_size: int, rows: int, crowded: bool) -> tuple[CacheSpec, Columns]:
    """Spec and raw columns of a made-up teacher."""
    spec = packed_spec(vocab_size=vocab_size, max_length=LENGTH, negatives=256)
    parts = [
        columns_of(spec, zipf_logits(spec, 1, seed=row, crowded=crowded), first=row)
        for row in range(rows)
    ]
    return spec, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def cached(rows: int) -> tuple[CacheSpec, Columns] | None:
    """Spec and raw columns of the cache that `dvc repro` made, if it lies here and is raw."""
    if not (DATA / "index.json").is_file():
        return None
    reader = CacheReader(DATA)
    if reader.spec.codec != "raw" or reader.spec.top_k < 64:
        return None
    columns = reader.gather(np.arange(min(rows, len(reader))))
    half = ("topk_logprobs", "negative_logprobs")
    columns |= {name: columns[name].astype(np.float32) for name in half}
    return dataclasses.replace(reader.spec, codec="packed"), columns


def errors(spec: CacheSpec, exact: Columns, found: Columns) -> dict[str, float]:
    """Mean errors over the positions that predict a real token."""
    mask = torch.from_numpy(np.arange(1, spec.max_length) < exact["length"][:, None]).flatten()
    sides = []
    for columns in (exact, found):
        ids, order = torch.from_numpy(columns["topk_ids"]).long().sort(dim=2)
        top = torch.from_numpy(columns["topk_logprobs"]).double().gather(2, order)
        negatives = torch.from_numpy(columns["negative_logprobs"]).double()
        scaled = torch.from_numpy(columns["scaled_logsumexp"]).double().flatten(0, 1)
        sides.append((ids, top.flatten(0, 1), negatives.flatten(0, 1), scaled))
    (ids, top, negatives, scaled), (_, other_top, other_negatives, other_scaled) = sides
    usable = negative_mask(torch.from_numpy(exact["negative_ids"]).long(), ids).flatten(0, 1)
    kept = torch.ones_like(top, dtype=torch.bool)
    both, other = torch.cat([top, negatives], 1), torch.cat([other_top, other_negatives], 1)
    t = spec.temperatures.index(2.0)
    of = {
        "kl": kd_candidates(other_top, top, kept, 1.0),
        "kl_t2": kd_candidates(other_top, top, kept, 2.0),
        "kl_t2_rest": kd_tail(other_top, other_scaled[:, t], top, scaled[:, t], kept, 2.0),
        "kl_t2_negatives": kd_candidates(other, both, torch.cat([kept, usable], 1), 2.0),
    }
    return {name: float(values[mask].mean()) for name, values in of.items()}


def measure(spec: CacheSpec, exact: Columns) -> list[dict[str, Any]]:
    """Bytes and errors at every size."""
    results = []
    for top_k, level_bits in SIZES:
        chosen = dataclasses.replace(spec, top_k=top_k, level_bits=level_bits)
        columns = dict(exact)
        for name in ("topk_ids", "topk_logprobs"):
            columns[name] = np.ascontiguousarray(exact[name][:, :, :top_k])
        found = decode(chosen, np.arange(len(exact["length"])), encode(chosen, columns))
        sizes = (chosen.vocab_size, top_k, chosen.temperatures, level_bits)
        raw = dataclasses.replace(chosen, codec="raw")
        results.append(
            {
                "top_k": top_k,
                "level_bits": level_bits,
                "record_bytes": record_bytes(*sizes),
                "bytes_per_token": chosen.bytes_per_token(),
                "raw_bytes_per_token": raw.bytes_per_token(),
                **errors(chosen, columns, found),
            }
        )
    return results


def timed(spec: CacheSpec, exact: Columns, rounds: int) -> dict[str, float]:
    """Seconds of encoding a row, and of reading a batch of 4 x 128 in either codec."""
    rows = len(exact["length"])
    seconds: dict[str, list[float]] = {"encode": []}
    with tempfile.TemporaryDirectory() as place:
        readers = {}
        for codec in ("raw", "packed"):
            chosen = dataclasses.replace(spec, codec=codec)
            stored = encode(chosen, exact)
            layout = chosen.columns()
            stored = {name: values.astype(layout[name][0]) for name, values in stored.items()}
            folder = Path(place, codec)
            folder.mkdir()
            write_index(folder, chosen, rows, [write_shard(folder, 0, chosen, 0, stored)])
            readers[codec] = CacheReader(folder)
            seconds[codec] = []
        generator = np.random.default_rng(0)
        for _ in range(rounds + 1):  # the first one warms up
            begin = time.perf_counter()
            encode(spec, exact)
            seconds["encode"].append(time.perf_counter() - begin)
            for codec, reader in readers.items():
                wanted = generator.integers(0, rows, BATCH)
                begin = time.perf_counter()
                reader.batch(wanted)
                seconds[codec].append(time.perf_counter() - begin)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {**median, "encode": median["encode"] / rows}


def main() -> None:
    """Measure all teachers and write ``results/cache_codec.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step-seconds", type=float, default=3.0, help="of a training step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on = machine()
    samples: dict[str, Any] = {}
    for vocab_size in (49152, 151936):
        for crowded in (False, True):
            spec, exact = made_up(vocab_size, options.rows, crowded)
            name = f"{'crowded' if crowded else 'spread'} {vocab_size}"
            samples[name] = measure(spec, exact)
    real = cached(16)
    if real is None:
        print("no raw cache of at least 64 in data/cache: `dvc repro cache` makes one")
    else:
        spec, exact = real
        samples["data/cache"] = measure(spec, exact)
    seconds = samples["seconds"] = timed(spec, exact, options.rounds)
    for name, results in samples.items():
        for r in results if name != "seconds" else ():
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in r.items()))
    save(
        "cache_codec",
        config=vars(options),
        samples=samples,
        summary={
            "encode_tokens_per_s": LENGTH / seconds["encode"],
            "decode_tokens_per_s": BATCH * LENGTH / seconds["packed"],
            "batch_ms_raw": 1e3 * seconds["raw"],
            "batch_ms_packed": 1e3 * seconds["packed"],
            "share_of_a_step": seconds["packed"] / options.step_seconds,
        },
        on=on,
    )


if __name__ == "__main__":
    main()
