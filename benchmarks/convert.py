"""Seconds and peak memory of quantizing a model and of converting it from 4 to 2 bits.

    python -m benchmarks.convert

Sizes and refits are those of the default experiment, with made-up moments of the inputs (the
calibration pass is timed on its own) and random weights of SmolLM2-135M's shape; without and with
error feedback.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import machine, save
from benchmarks.rivals import Rival, alone

PARAMS = Path(__file__).parents[1] / "params.yaml"
CALIBRATION = 32  # sequences of 128 tokens


def _specs(init: str) -> tuple[Any, Any]:
    """What the default experiment quantizes to, and what it converts that to, from this start."""
    from lib.params.load import parse_params, read_yaml
    from lib.params.specs import model_spec, target_spec

    params = parse_params(read_yaml(PARAMS), PARAMS.name)
    quant = params.quant.model_copy(update={"init": init})
    convert = params.convert.model_copy(update={"init": init})
    return model_spec(quant), target_spec(convert, quant.ste_fp16)


def _moments(model: Any, spec: Any) -> dict[str, Any]:
    """What ``spec`` needs of the inputs, the same for all layers with as many."""
    import torch

    from lib.model.surgery import projections
    from lib.quant.spec import Moments

    generator = torch.Generator().manual_seed(0)
    widths = {name: module.in_features for name, module in projections(model).items()}
    made = {}
    for width in sorted(set(widths.values())):
        squares = torch.rand(width, generator=generator) + 0.1
        x = torch.randn(4 * width, width, generator=generator) * squares.sqrt()
        made[width] = x.T @ x / len(x) if spec.needs is Moments.PRODUCTS else squares
    return {name: made[width] for name, width in widths.items()}


def build_quantize(config: dict[str, Any]) -> Callable[[], None]:
    """Quantize a fresh model each time; its loading is not counted, as it is kept aside."""
    from benchmarks.shapes import random_model
    from lib.model.surgery import projections, quantize_model, replace_module

    model = random_model(config["shape"])
    plain = dict(projections(model))
    spec, _ = _specs(config["init"])
    moments = _moments(model, spec)

    def step() -> None:
        for name, module in plain.items():
            replace_module(model, name, module)
        quantize_model(model, spec, moments)

    return step


def build_convert(config: dict[str, Any]) -> Callable[[], None]:
    """Convert the same 4-bit model each time."""
    from benchmarks.shapes import random_model
    from lib.convert.convert import convert_model
    from lib.model.surgery import quantize_model, quantized_layers, replace_module

    model = random_model(config["shape"])
    q4, q2 = _specs(config["init"])
    moments = _moments(model, q2)
    quantize_model(model, q4, moments)
    before = dict(quantized_layers(model))

    def step() -> None:
        for name, layer in before.items():
            replace_module(model, name, layer)
        convert_model(model, q2, moments)

    return step


def build_calibrate(config: dict[str, Any]) -> Callable[[], None]:
    """The pass over calibration text that either needs first."""
    import torch

    from benchmarks.shapes import random_model
    from lib.model.calibrate import input_moments

    model = random_model(config["shape"])
    ids = torch.randint(0, model.config.vocab_size, (CALIBRATION, 128))
    lengths = torch.full((CALIBRATION,), 128)

    def step() -> None:
        input_moments(model, ids, lengths, full=False)

    return step


def main() -> None:
    """Time both and write ``results/convert.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    on = machine()
    common = {"shape": "smollm2-135m", "threads": options.threads, "warmup": 1}
    refit, feedback = ({**common, "init": i} for i in ("importance", "importance+gptq"))
    rivals = [
        Rival("quantize", build_quantize, refit),
        Rival("convert", build_convert, refit),
        Rival("calibrate", build_calibrate, common),
        Rival("quantize_feedback", build_quantize, feedback),
        Rival("convert_feedback", build_convert, feedback),
    ]
    for rival in rivals:
        alone(rival, options.rounds)
    median = {rival.name: statistics.median(rival.seconds) for rival in rivals}
    save(
        "convert",
        config=vars(options),
        samples={
            r.name: {"seconds": r.seconds, "peak_bytes": r.peak_bytes, "profile": r.profile}
            for r in rivals
        },
        summary={
            **{f"{name}_seconds": seconds for name, seconds in median.items()},
            "convert_peak_gb": rivals[1].peak_bytes / 1e9,
        },
        on=on,
    )


if __name__ == "__main__":
    main()
