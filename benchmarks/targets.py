"""What a model learns from at equal bytes per token: the top k, drawn targets, or all logits.

    python -m benchmarks.targets

Needs data/teacher and data/tokens of `dvc repro`, or `--teacher` and `--tokens`, made with that
teacher's tokenizer. Each seed has caches of its own (other negatives, other draws) and another
order of the data, which all arms share; there are as many drawn targets as the bytes of the top k
allow. Every run starts from the same quantized model, and is judged after its last step by the
full-vocabulary KL(teacher || model) and by perplexity, both of the test split.
The held-out KD written beside them is that of the top k, for topk_tail with its class of the rest.
The same command goes on where it was ended, from `results/targets.partial.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.apart import apart
from benchmarks.methods import CALIBRATION, COMMON, RATES, SPEC
from benchmarks.record import RESULTS, machine, save
from benchmarks.rivals import peak_memory
from lib.base.files import write_json
from lib.cache.spec import CacheSpec

ARMS = {
    "topk": "the top k and negatives, renormalized",
    "topk_tail": "the same, and the rest of the vocabulary as one class",
    "sampled": "drawn targets of as many bytes",
    "teacher": "all logits, from the teacher in memory",
}


def matched(spec: CacheSpec, power: float) -> CacheSpec:
    """Drawn targets of at most as many bytes per token as the top k of ``spec``."""
    one = dataclasses.replace(spec, targets="sampled", samples=1, sample_power=power)
    spare = round((spec.bytes_per_token() - one.bytes_per_token()) * spec.max_length)
    more = spare // (6 * spec.positions)  # an id and a float16 each
    return dataclasses.replace(one, samples=min(1 + more, spec.vocab_size))


def build(work: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write ``topk/train``, ``topk/val`` and ``sampled/train``; what they hold."""
    import torch

    from lib.base.device import set_threads
    from lib.capture.build import build_cache, cache_statistics
    from lib.model.load import folder_fingerprint, load_causal_lm, tokenizer_fingerprint
    from lib.text.sequences import TokenSet

    set_threads(options.threads)
    model = load_causal_lm(options.teacher)
    figures = {}
    for place in ("topk/val", "topk/train", "sampled/train"):
        targets, split = place.split("/")
        rows = TokenSet(options.tokens / split)
        if split == "train" and options.sequences:
            rows = rows.first(options.sequences)
        spec = CacheSpec(
            teacher=folder_fingerprint(options.teacher),
            tokenizer=tokenizer_fingerprint(options.teacher),
            tokens=rows.meta["fingerprint"],
            split=split,
            vocab_size=model.config.vocab_size,
            max_length=rows.input_ids.shape[1],
            top_k=options.top_k,
            negatives=options.negatives,
            temperatures=tuple(sorted({1.0, options.temperature})),
            seed=seed,
            sample_temperature=options.temperature,
        )
        if targets == "sampled":
            spec = matched(spec, options.power)
        out, scratch = work / place, work / "scratch" / place
        sizes = {"batch_size": 8, "shard_sequences": 64}
        build_cache(model, rows, spec, out, scratch, **sizes, device=torch.device("cpu"))
        figures[place] = cache_statistics(out)
        if targets == "sampled":
            figures[place]["samples"] = spec.samples
    return {targets: figures[f"{targets}/train"] for targets in ("topk", "sampled")}


def _train(arm: str, seed: int, work: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """A trained model; seconds, held-out KD before and after, peak bytes."""
    import torch

    from benchmarks.training import untrained
    from lib.base.device import set_threads
    from lib.cache.shards import CacheReader
    from lib.evaluate.memory import reset_peak
    from lib.objective.live import TextBatches
    from lib.params.training import Distill, Quant, Weights
    from lib.train.loop import Trainer
    from lib.train.run import lesson_of
    from lib.train.source import LiveTeacher

    set_threads(options.threads)
    given = {**COMMON, "steps": options.steps, "warmup_steps": min(4, options.steps)}
    none = {"hard_top1_weight": 0.0, "hard_full_weight": 0.0}
    params = Weights(**given, **none, rates=RATES, seed=seed)
    tail = arm == "topk_tail"
    distill = Distill(temperature=options.temperature, target="tail" if tail else "candidates")
    cache = work / ("sampled" if arm == "sampled" else "topk")
    model = untrained(options.teacher, cache, Quant(**SPEC), CALIBRATION)
    train, val = CacheReader(cache / "train"), CacheReader(work / "topk" / "val")
    device = torch.device("cpu")
    loss: Any
    rows: Any
    loss, rows = lesson_of(params, distill, train, val)
    if arm == "teacher":
        live = LiveTeacher(teacher=options.teacher, tokens=options.tokens)
        loss, text = live.load(params, distill, loss.measured(), device)
        rows = TextBatches(text.tokens.first(len(train)))
    reset_peak()
    began = time.perf_counter()
    trainer = Trainer(model, params, loss, rows, val, device, work / "run" / arm)
    progress = trainer.run(lambda _: None).progress
    return model, {
        "seconds": time.perf_counter() - began,
        "kd_before": progress.initial_loss,
        "kd_after": progress.last_loss,
        "best_step": progress.best_step,
        "peak_bytes": peak_memory(),
    }


def _measure(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Perplexity, full-vocabulary KL and agreement on the test split."""
    from lib.evaluate.agreement import TeacherTarget
    from lib.evaluate.perplexity import perplexity
    from lib.model.load import load_causal_lm
    from lib.model.surgery import bake
    from lib.text.sequences import TokenSet, read_stream

    test, count = TokenSet(options.tokens / "test"), options.kl_sequences
    bake(model)
    teacher = load_causal_lm(options.teacher)
    found = TeacherTarget(teacher, test.input_ids[:count], test.lengths[:count]).compare(model)
    stream = read_stream(options.tokens / "test")[: options.perplexity_tokens]
    return {
        "kl": found.kl,
        "top1": found.top1,
        "perplexity": perplexity(model, stream, window=1024, stride=512),
    }


def one(arm: str, seed: int, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """One training and its judgement."""
    model, trained = _train(arm, seed, work, options)
    return {**trained, **_measure(model, options)}


def summary_of(samples: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians of each arm, and of its distance from the first one with the same seed."""
    found, first = {}, next(iter(samples))
    for arm, rows in samples.items():
        for key in ("kl", "perplexity", "seconds"):
            found[f"{arm}_{key}"] = statistics.median(row[key] for row in rows)
        if arm != first:
            pairs = list(zip(rows, samples[first], strict=True))
            for key in ("kl", "perplexity"):
                gaps = [row[key] - other[key] for row, other in pairs]
                found[f"{arm}_minus_{first}_{key}"] = statistics.median(gaps)
    return found


@dataclasses.dataclass
class Progress:
    """What is measured so far, in a file from which a run that was ended goes on."""

    file: Path
    config: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    caches: dict[str, Any]

    @classmethod
    def of(cls, file: Path, config: dict[str, Any], arms: list[str]) -> Progress:
        """What ``file`` has, if it is of the same configuration; else nothing."""
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if before.get("config") == config:
            return cls(file, **before)
        return cls(file, config, {arm: [] for arm in arms}, {})

    def missing(self, seed: int) -> list[str]:
        """Arms that have not been measured with a seed."""
        return [arm for arm, rows in self.samples.items() if seed not in {r["seed"] for r in rows}]

    def save(self) -> None:
        """Write everything down."""
        values = {"config": self.config, "samples": self.samples, "caches": self.caches}
        write_json(self.file, values)


def _config_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options; teacher and tokens by what is in them, not by where they lie."""
    from lib.model.load import folder_fingerprint
    from lib.text.sequences import TokenSet

    tokens = {
        split: TokenSet(options.tokens / split).meta["fingerprint"]
        for split in ("train", "val", "test")
    }
    found = {"teacher": folder_fingerprint(options.teacher), "tokens": tokens}
    return {**vars(options), **found, "arms": ARMS}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("data/teacher"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument("--power", type=float, default=1.0, help="cache.sample_power")
    parser.add_argument("--temperature", type=float, default=2.0, help="of all arms")
    parser.add_argument("--sequences", type=int, default=0, help="of the train split; 0 = all")
    parser.add_argument("--kl-sequences", type=int, default=16)
    parser.add_argument("--perplexity-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    return parser.parse_args()


def main() -> None:
    """Train every arm with every seed, in turns, and write ``results/targets.json``."""
    options = _options()
    on = machine()
    config = _config_of(options)
    progress = Progress.of(RESULTS / "targets.partial.json", config, options.only)
    for seed in options.seeds:
        missing = progress.missing(seed)
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as place:
            work = Path(place)
            progress.caches[str(seed)] = apart(build, work, seed, options)
            print(f"seed {seed}, caches: {progress.caches[str(seed)]}", flush=True)
            for arm in missing:
                result = apart(one, arm, seed, work, options)
                progress.samples[arm].append({"seed": seed, **result})
                progress.save()
                figures = "  ".join(f"{key} {value:.5g}" for key, value in result.items())
                print(f"{arm} seed {seed}: {figures}", flush=True)
    samples = {**progress.samples, "caches": progress.caches}
    save("targets", config=config, samples=samples, summary=summary_of(progress.samples), on=on)
    progress.file.unlink()


if __name__ == "__main__":
    main()
