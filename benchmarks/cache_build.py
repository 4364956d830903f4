"""Tokens per second of building a cache against a bare forward pass of the same teacher.

    python -m benchmarks.cache_build

A step is one shard: 16 sequences of 128 tokens, read, run, written and checked as the stage does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.record import machine, save
from benchmarks.rivals import Contest, Rival, duel

SEQUENCES, LENGTH, BATCH = 16, 128, 8


def build_forward(config: dict[str, Any]) -> Callable[[], None]:
    """The rival: the teacher's forward pass, logits and all, and nothing kept."""
    import torch

    from benchmarks.shapes import random_model

    model = random_model(config["shape"]).eval()
    ids = torch.randint(0, model.config.vocab_size, (SEQUENCES, LENGTH))

    @torch.inference_mode()
    def step() -> None:
        for rows in ids.split(BATCH):
            model(input_ids=rows, use_cache=False)

    return step


def build_cache_shard(config: dict[str, Any]) -> Callable[[], None]:
    """A whole build of a cache of one shard."""
    from pathlib import Path

    import numpy as np
    import torch

    from benchmarks.shapes import random_model
    from lib.cache.spec import CacheSpec
    from lib.capture.build import build_cache
    from lib.text.sequences import TokenSet, write_tokens

    model = random_model(config["shape"]).eval()
    vocabulary = model.config.vocab_size
    place = Path(tempfile.mkdtemp())
    ids = np.random.default_rng(0).integers(0, vocabulary, (SEQUENCES, LENGTH), dtype=np.int32)
    lengths = np.full(SEQUENCES, LENGTH, dtype=np.int32)
    about = {"split": "train", "vocab_size": vocabulary, "pad_id": 0, "tokenizer": "none"}
    write_tokens(place / "tokens", ids, lengths, **about)
    tokens = TokenSet(place / "tokens")
    spec = CacheSpec(
        teacher="random",
        tokenizer="none",
        tokens=tokens.meta["fingerprint"],
        split="train",
        vocab_size=vocabulary,
        max_length=LENGTH,
        top_k=64,
        negatives=256,
        temperatures=(1.0, 2.0),
        seed=0,
    )
    sizes = {"batch_size": BATCH, "shard_sequences": SEQUENCES}

    def step() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            cpu = torch.device("cpu")
            build_cache(model, tokens, spec, place / "cache", Path(scratch), **sizes, device=cpu)

    return step


def main() -> None:
    """Let the two take turns and write ``results/cache_build.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    on = machine()
    config = {"shape": "smollm2-135m", "threads": options.threads, "warmup": 1}
    forward = Rival("forward", build_forward, config)
    cache = Rival("cache", build_cache_shard, config)
    with Contest() as contest:
        contest.enter(forward)
        slowdown = duel(contest, forward, cache, options.rounds)
    tokens = SEQUENCES * LENGTH
    save(
        "cache_build",
        config=vars(options),
        samples={
            rival.name: {"seconds": rival.seconds, "profile": rival.profile}
            for rival in (forward, cache)
        },
        summary={
            "cache_over_forward": 1 / slowdown,
            "cache_tokens_per_s": tokens / statistics.median(cache.seconds),
            "forward_tokens_per_s": tokens / statistics.median(forward.seconds),
        },
        on=on,
    )


if __name__ == "__main__":
    main()
