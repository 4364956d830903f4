"""cache: what the teacher says about the training and validation tokens, and only about those.

Usage: python -m stages.cache TEACHER TOKENS OUT
"""

from __future__ import annotations

from pathlib import Path

from lib.base.device import resolve_device, set_threads
from lib.base.files import fingerprint, write_json
from lib.base.scratch import scratch_folder
from lib.base.stage import run_stage
from lib.base.workers import is_main, join, start_workers
from lib.cache.spec import CacheSpec
from lib.capture.build import build_cache, cache_metrics
from lib.model.load import folder_fingerprint, load_causal_lm, tokenizer_fingerprint
from lib.params.load import stage_params
from lib.text.sequences import TokenSet


def main(teacher: Path, tokens: Path, out: Path) -> None:
    """Build the cache of both splits; a killed build resumes at its last finished shard."""
    params = stage_params("cache")
    if start_workers("cache", params.run.processes):
        return
    wanted = params.cache
    set_threads(params.run.threads)
    device = join(resolve_device(params.run.device))
    model = load_causal_lm(teacher)
    marks = {"teacher": folder_fingerprint(teacher), "tokenizer": tokenizer_fingerprint(teacher)}
    sets = {split: TokenSet(tokens / split) for split in ("train", "val")}
    if wanted.train_sequences:
        sets["train"] = sets["train"].first(wanted.train_sequences)
    specs = {
        split: CacheSpec.of(
            wanted,
            **marks,
            tokens=rows.meta["fingerprint"],
            split=split,
            vocab_size=model.config.vocab_size,
            max_length=rows.input_ids.shape[1],
        )
        for split, rows in sets.items()
    }
    sizes = {"batch_size": wanted.batch_size, "shard_sequences": wanted.shard_sequences}
    key = fingerprint([params.declared_fingerprint(), *(s.fingerprint for s in specs.values())])
    with scratch_folder("cache", key) as scratch:
        for split, rows in sets.items():
            folders = (out / split, scratch / split)
            build_cache(model, rows, specs[split], *folders, **sizes, device=device)
        if is_main():
            write_json(out / "metrics.json", {"cache": cache_metrics(out)})


if __name__ == "__main__":
    run_stage(main)
