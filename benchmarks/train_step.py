"""A training step of every role set against a plain fine-tuning step of the same model.

    python -m benchmarks.train_step

Plain: all linear weights train (the tied head too), full-vocabulary cross-entropy, gradient
clipping, fused AdamW; the faster of eager and compiled counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.record import machine, save
from benchmarks.rivals import Contest, Rival, alone, duel

LENGTH = 128  # tokens per sequence, as in the default cache
ROLES = {
    "scales": {"scale_direction": 1e-4, "scale_magnitude": 1e-4},
    "weights": {"weight": 1e-5},
    "both": {"weight": 1e-5, "scale_direction": 1e-4, "scale_magnitude": 1e-4},
}
FORMS = {
    "q4_lowrank_r4": {"lut_size": 16, "rank": 4, "scale": "lowrank"},
    "q2_directional_r32": {"lut_size": 4, "rank": 32, "scale": "directional"},
}


def build_plain(config: dict[str, Any]) -> Callable[[], None]:
    """The rival: a step of ordinary full fine-tuning."""
    import torch

    from benchmarks.shapes import random_batch, random_model

    model = random_model(config["shape"])
    batch = random_batch(
        model.config.vocab_size, config["tokens"] // LENGTH, LENGTH, top_k=1, negatives=1
    )
    if not config["head_trains"]:
        model.get_output_embeddings().weight.requires_grad_(False)
    if config["compiled"]:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build_quantized(config: dict[str, Any]) -> Callable[[], None]:
    """A step of the project's own trainer, on a batch in memory."""
    from pathlib import Path

    import torch

    from benchmarks.shapes import random_batch, random_model
    from benchmarks.trainer import trainer_on
    from lib.model.surgery import quantize_model
    from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm

    model = random_model(config["shape"])
    form = config["form"]
    spec = LinearSpec(
        lut_size=form["lut_size"],
        rank=form["rank"],
        group_size=32,
        scale=ScaleForm(form["scale"]),
        codebook=Codebook.UNIFORM,
    )
    quantize_model(model, ModelSpec(mlp=spec, attention=spec))
    batch = random_batch(
        model.config.vocab_size, config["tokens"] // LENGTH, LENGTH, top_k=64, negatives=256
    )
    trainer = trainer_on(model, batch, config["rates"], torch.device("cpu"), Path())
    return trainer.train_step


def build_product(config: dict[str, Any]) -> Callable[[], None]:
    """100 products of the MLP's size: the rate that the machine multiplies matrices at."""
    import torch

    x, w = torch.randn(config["tokens"], 576), torch.randn(1536, 576)

    def step() -> None:
        for _ in range(100):
            torch.nn.functional.linear(x, w)

    return step


def matrix_rate(tokens: int, options: argparse.Namespace) -> float:
    """Floating-point operations per second of such a product, at its median."""
    config = {"tokens": tokens, "threads": options.threads, "warmup": 1}
    rival = Rival("product", build_product, config)
    alone(rival, options.rounds)
    return 100 * 2 * tokens * 576 * 1536 / statistics.median(rival.seconds)


def plain_rivals(common: dict[str, Any]) -> list[Rival]:
    """Plain fine-tuning, eager and compiled, with a head that trains."""
    return [
        Rival(
            f"plain_{way}", build_plain, {**common, "compiled": way != "eager", "head_trains": True}
        )
        for way in ("eager", "compiled")
    ]


def challengers(common: dict[str, Any]) -> list[Rival]:
    """Every role set in every form; and plain fine-tuning with a frozen head, for information."""
    found = [
        Rival(f"{role}_{form}", build_quantized, {**common, "form": sizes, "rates": rates})
        for form, sizes in FORMS.items()
        for role, rates in ROLES.items()
    ]
    frozen = {**common, "compiled": False, "head_trains": False}
    return [*found, Rival("plain_eager_frozen_head", build_plain, frozen)]


def compare(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """All duels at one batch size: the faster plain step stays, challengers come and go."""
    common = {"shape": "smollm2-135m", "tokens": tokens, "threads": options.threads, "warmup": 2}
    plain = plain_rivals(common)
    with Contest() as contest:
        for rival in plain:
            contest.enter(rival)
        for _ in range(options.rounds):
            contest.round()
        plain.sort(key=lambda rival: statistics.median(rival.seconds))
        champion, slower = plain
        contest.leave(slower.name)
        found = challengers(common)
        ratios = {rival.name: duel(contest, champion, rival, options.rounds) for rival in found}
    for rival in [*plain, *found]:
        print(
            f"{rival.name:28} {statistics.median(rival.seconds):7.3f} s  "
            f"{ratios.get(rival.name, 1.0):6.3f}  {rival.peak_bytes / 1e9:6.2f} GB",
            flush=True,
        )
    return {
        "plain": champion.name,
        "ratios": ratios,
        "seconds": {rival.name: rival.seconds for rival in [*plain, *found]},
        "peak_bytes": {rival.name: rival.peak_bytes for rival in [*plain, *found]},
        "profiles": {rival.name: rival.profile for rival in [*plain, *found]},
    }


def main() -> None:
    """Compare at both batch sizes and write ``results/train_step.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    on = machine()
    samples: dict[str, Any] = {}
    summary: dict[str, float] = {}
    memory: list[float] = []
    for tokens in options.tokens:
        print(f"{tokens} tokens a step")
        result = samples[str(tokens)] = compare(tokens, options)
        ours = [name for name in result["ratios"] if not name.startswith("plain")]
        summary[f"qat_over_plain_{tokens}"] = max(result["ratios"][name] for name in ours)
        result["matrix_flops"] = matrix_rate(tokens, options)
        peak = result["peak_bytes"]
        memory += [peak[name] / peak[result["plain"]] for name in ours]
    summary["peak_memory_over_plain"] = max(memory)
    save("train_step", config=vars(options), samples=samples, summary=summary, on=on)


if __name__ == "__main__":
    main()
