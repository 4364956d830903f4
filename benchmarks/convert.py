"""Seconds and peak memory of quantizing a model and of converting it from 4 to 2 bits.

    python -m benchmarks.convert

Both as in the default experiment: importance-weighted refits, here with made-up importances (their
calibration pass is timed on its own), random weights of SmolLM2-135M's shape.
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


def _specs() -> tuple[Any, Any]:
    """What the default experiment quantizes to, and what it converts that to."""
    from lib.params.load import parse_params, read_yaml
    from lib.params.specs import model_spec, target_spec

    params = parse_params(read_yaml(PARAMS), PARAMS.name)
    return model_spec(params.quant), target_spec(params.convert, params.quant.ste_fp16)


def _importance(model: Any) -> dict[str, Any]:
    import torch

    from lib.model.surgery import projections

    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(module.in_features, generator=generator) + 0.1
        for name, module in projections(model).items()
    }


def build_quantize(config: dict[str, Any]) -> Callable[[], None]:
    """Quantize a fresh model each time; its loading is not counted, as it is kept aside."""
    from benchmarks.shapes import random_model
    from lib.model.surgery import projections, quantize_model, replace_module

    model = random_model(config["shape"])
    importance = _importance(model)
    plain = dict(projections(model))
    spec, _ = _specs()

    def step() -> None:
        for name, module in plain.items():
            replace_module(model, name, module)
        quantize_model(model, spec, importance)

    return step


def build_convert(config: dict[str, Any]) -> Callable[[], None]:
    """Convert the same 4-bit model each time."""
    from benchmarks.shapes import random_model
    from lib.convert.convert import convert_model
    from lib.model.surgery import quantize_model, quantized_layers, replace_module

    model = random_model(config["shape"])
    importance = _importance(model)
    q4, q2 = _specs()
    quantize_model(model, q4, importance)
    before = dict(quantized_layers(model))

    def step() -> None:
        for name, layer in before.items():
            replace_module(model, name, layer)
        convert_model(model, q2, importance)

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
    rivals = [
        Rival("quantize", build_quantize, common),
        Rival("convert", build_convert, common),
        Rival("calibrate", build_calibrate, common),
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
            "quantize_seconds": median["quantize"],
            "convert_seconds": median["convert"],
            "calibrate_seconds": median["calibrate"],
            "convert_peak_gb": rivals[1].peak_bytes / 1e9,
        },
        on=on,
    )


if __name__ == "__main__":
    main()
