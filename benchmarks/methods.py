"""End to end, layer by layer, block by block: the same bits, the same time, three orders of data.

    python -m benchmarks.methods

Needs data/ of `dvc repro` (teacher, tokens, cache). Every run starts from the same quantized model
and trains scales and weights together. Perplexity and KL are of the test split.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.apart import apart
from benchmarks.record import machine, save
from benchmarks.rivals import peak_memory

DATA = Path("data")
SPEC = {
    "lut_size": 4,
    "attention_lut_size": 16,
    "rank": 32,
    "attention_rank": 8,
    "scale": "directional",
    "range": 0.65,
    "init": "importance",
    "refit_steps": 4,
}
CALIBRATION = 16  # sequences
COMMON = {
    "batch_size": 4,
    "schedule": "cosine",
    "eval_every": 1000,
    "eval_sequences": 12,
    "checkpoint_every": 1000,
}
RATES = {"weight": 4e-4, "scale_direction": 2e-4, "scale_magnitude": 0.02}
BLOCK_RATES = {"weight": 4e-4, "scale_direction": 2e-4, "scale_magnitude": 5e-3}


def _settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Steps and epochs that take about the same time."""
    return {
        "e2e": {"method": "e2e", "steps": options.steps, "rates": RATES, "warmup_steps": 4},
        "layerwise": {
            "method": "layerwise",
            "steps": options.layer_steps,
            "batch_size": 2,
            "eval_sequences": 4,
            "rates": RATES,
            "layerwise": {"sequences": options.sequences},
        },
        "blockwise": {
            "method": "blockwise",
            "rates": BLOCK_RATES,
            "blockwise": {"epochs": options.epochs, "sequences": options.sequences},
        },
        "blockwise_adaptive": {
            "method": "blockwise",
            "rates": BLOCK_RATES,
            "blockwise": {
                "epochs": options.adaptive_epochs,
                "adaptive": 0.25,
                "sequences": options.sequences,
            },
        },
    }


def _train(settings: dict[str, Any], seed: int, scratch: Path) -> tuple[Any, dict[str, float]]:
    """A trained model, and seconds, held-out KD before and after, peak bytes."""
    import torch

    from benchmarks.training import untrained
    from lib.base.device import set_threads
    from lib.cache.shards import CacheReader
    from lib.evaluate.memory import reset_peak
    from lib.params.methods import Blockwise, Layerwise
    from lib.params.training import Distill, Quant, Weights
    from lib.train.by_block import Task, train_by_block
    from lib.train.loop import Trainer
    from lib.train.method import ByBlock
    from lib.train.run import objective_of

    set_threads(0)
    given = dict(settings)
    ways = {
        "layerwise": Layerwise(**given.pop("layerwise", {})),
        "blockwise": Blockwise(**given.pop("blockwise", {})),
    }
    params = Weights(**{**COMMON, **given}, seed=seed, hard_top1_weight=0.0, hard_full_weight=0.0)
    model = untrained(DATA / "teacher", DATA / "cache", Quant(**SPEC), CALIBRATION)
    train, val = (CacheReader(DATA / "cache" / split) for split in ("train", "val"))
    objective = objective_of(params, Distill(), train)
    reset_peak()
    began = time.perf_counter()
    sets = (model, params, objective, train, val, torch.device("cpu"), scratch)
    if params.method == "e2e":
        progress = Trainer(*sets).run(lambda _: None).progress
    else:
        scores = Path("runs/sensitivity/scores.json")
        chosen = ByBlock(method=params.method, teacher=DATA / "teacher", scores=scores, **ways)
        progress = train_by_block(chosen.make(Task(*sets)), scratch, lambda _: None)
    return model, {
        "seconds": time.perf_counter() - began,
        "kd_before": progress.initial_loss,
        "kd_after": progress.best_loss,
        "peak_bytes": peak_memory(),
        "steps": progress.step,
    }


def _measure(model: Any) -> dict[str, float]:
    """Perplexity and KL on the test split, bits per weight."""
    from lib.evaluate.agreement import TeacherTarget
    from lib.evaluate.perplexity import perplexity
    from lib.model.load import load_causal_lm
    from lib.model.size import model_size
    from lib.model.surgery import bake
    from lib.text.sequences import TokenSet, read_stream

    test = TokenSet(DATA / "tokens" / "test")
    bits = model_size(model).bits_per_layer_weight
    bake(model)
    count, tokens = 16, 4096  # sequences for KL, tokens for the perplexity
    teacher = load_causal_lm(DATA / "teacher")
    target = TeacherTarget(teacher, test.input_ids[:count], test.lengths[:count])
    stream = read_stream(DATA / "tokens" / "test")[:tokens]
    return {
        "perplexity": perplexity(model, stream, window=1024, stride=512),
        "kl": target.compare(model).kl,
        "bits_per_layer_weight": bits or 0.0,
    }


def _one(settings: dict[str, Any], seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        model, trained = _train(settings, seed, Path(scratch))
        return {**trained, **_measure(model)}


def run(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """One training in a process of its own."""
    return apart(_one, settings, seed)


def main() -> None:
    """Train every method with every seed, in turns, and write ``results/methods.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=32, help="end to end")
    parser.add_argument("--layer-steps", type=int, default=2, help="layer by layer, each")
    parser.add_argument("--epochs", type=float, default=1.0, help="block by block")
    parser.add_argument(
        "--adaptive-epochs", type=float, default=0.927, help="before the extra ones"
    )
    parser.add_argument("--sequences", type=int, default=64, help="layers and blocks: of the cache")
    parser.add_argument("--only", nargs="+", help="methods; all without it")
    options = parser.parse_args()
    on = machine()
    samples: dict[str, Any] = {}
    chosen = {k: v for k, v in _settings(options).items() if not options.only or k in options.only}
    for seed in options.seeds:
        for name, settings in chosen.items():
            result = run(settings, seed)
            samples.setdefault(name, []).append({"seed": seed, **result})
            figures = "  ".join(f"{key} {value:.5g}" for key, value in result.items())
            print(f"{name} seed {seed}: {figures}", flush=True)
    summary = {
        f"{name}_{key}": statistics.median(row[key] for row in rows)
        for name, rows in samples.items()
        for key in ("perplexity", "kl", "seconds", "peak_bytes")
    }
    save("methods", config=vars(options), samples=samples, summary=summary, on=on)


if __name__ == "__main__":
    main()
