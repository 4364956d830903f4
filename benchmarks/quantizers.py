"""The peers: each turns the teacher into dense weights that its own storage can hold.

Their packages are extras (requirements-peers.txt) and are loaded when they are used. Embeddings,
and the head that is tied to them, stay as they are in all of them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.budget import Made, Trial, Work, iterations_for
from benchmarks.storage import FP16, Storage, bits_per_weight, integers, palette
from benchmarks.training import Tuning, train
from lib.model.linear import ParameterRole
from lib.model.surgery import projections
from lib.train.roles import Trainable


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The projections that are quantized, by name."""
    found = {n: m for n, m in projections(model).items() if isinstance(m, nn.Linear)}
    assert found
    return found


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """``weight [out, in]`` on the grid of its groups of inputs, the baseline of AWQ and GPTQ.

    The grid goes from the smallest to the largest value (and 0), its scale is FP16, its zero point
    one of its integers.
    """
    if weight.shape[1] % group_size:
        raise ValueError(f"{weight.shape[1]} inputs are no multiple of {group_size}")
    groups = weight.unflatten(1, (-1, group_size))
    low = groups.amin(dim=2, keepdim=True).clamp_max(0)
    high = groups.amax(dim=2, keepdim=True).clamp_min(0)
    top = 2**bits - 1
    smallest = torch.finfo(torch.float16).smallest_normal
    scale = ((high - low) / top).clamp_min(smallest).half().float()
    zero = (-low / scale).round().clamp(0, top)
    levels = ((groups / scale).round() + zero).clamp(0, top)
    return ((levels - zero) * scale).flatten(1)


def rtn(work: Work, bits: int, group_size: int) -> Made:
    """Round to nearest, asymmetric, in groups of inputs."""
    layers = linear_layers(work.teacher())
    weights = {n: round_to_nearest(m.weight.detach(), bits, group_size) for n, m in layers.items()}
    return _made(weights, integers(bits, group_size, zero_bits=bits))


def _made(weights: dict[str, Tensor], storage: Storage, **run: Any) -> Made:
    return Made(weights=weights, bits=bits_per_weight(weights, storage), run=run)


def kmeans(work: Work, bits: int, outputs: int) -> Made:
    """coremltools' palettization after training: k-means in groups of outputs, FP16 tables."""
    with work.clock.aside():
        from coremltools.optimize.torch.palettization import (
            PostTrainingPalettizer,
            PostTrainingPalettizerConfig,
        )
    layers = linear_layers(work.teacher())
    settings = {
        "n_bits": bits,
        "granularity": "per_grouped_channel",
        "group_size": outputs,
        "channel_axis": 0,
    }
    config = PostTrainingPalettizerConfig.from_dict({"global_config": settings})
    found = PostTrainingPalettizer(nn.ModuleList(layers.values()), config).compress()
    weights = {
        name: layer.weight.detach().half().float()
        for name, layer in zip(layers, found, strict=True)
    }
    return _made(weights, palette(bits, outputs))


def hqq(work: Work, bits: int, group_size: int) -> Made:
    """Half-quadratic quantization with its own settings; scale and zero point are FP16."""
    with work.clock.aside():
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    weights = {}
    for name, layer in linear_layers(work.teacher()).items():
        quantized = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
        weights[name] = quantized.dequantize().detach().float().reshape(-1, quantized.in_features)
    return _made(weights, integers(bits, group_size, zero_bits=FP16))


ROUNDING_BATCH = 8  # sequences per iteration: AutoRound's own


def autoround(work: Work, bits: int, group_size: int) -> Made:
    """AutoRound, symmetric as is its default, on the training text; as many iterations per block as
    the budget allows (its own default is 200). At 2 bits with the extension that it recommends."""
    with work.clock.aside():
        trials = [
            _trial(work, bits, group_size, *size) for size in ((1, 2), (1, 4), (2, 4), (2, 12))
        ]
    model = work.teacher()
    count = len(_blocks(model))
    iterations = iterations_for(work.left, count, (trials[1], trials[2], trials[3]))
    weights = _auto_round(work, model, bits, group_size, iterations)
    storage = integers(bits, group_size, zero_bits=0)
    return _made(weights, storage, iterations=iterations, blocks=count)


def _blocks(model: PreTrainedModel) -> Any:
    return model.base_model.layers


def _trial(work: Work, bits: int, group_size: int, blocks: int, iterations: int) -> Trial:
    """A run on the first blocks; the very first one also loads the package."""
    model = work.teacher()
    model.base_model.layers = _blocks(model)[:blocks]
    began = time.perf_counter()
    _auto_round(work, model, bits, group_size, iterations)
    return Trial(blocks=blocks, iterations=iterations, seconds=time.perf_counter() - began)


def _auto_round(
    work: Work, model: PreTrainedModel, bits: int, group_size: int, iterations: int
) -> dict[str, Tensor]:
    from auto_round import AutoRound

    from lib.model.load import load_tokenizer

    ids, _ = work.text()
    whole = ids[: len(ids) // ROUNDING_BATCH * ROUNDING_BATCH]
    found, _ = AutoRound(
        model,
        load_tokenizer(work.data / "teacher"),
        scheme="W4A16",
        bits=bits,
        group_size=group_size,
        sym=True,
        iters=iterations,
        enable_alg_ext=bits == 2,
        dataset=list(whole.split(ROUNDING_BATCH)),
        nsamples=len(whole),
        seqlen=ids.shape[1],
        batch_size=ROUNDING_BATCH,
        device_map="cpu",
        enable_torch_compile=False,
        seed=0,
    ).quantize()
    return {name: layer.weight.detach().float() for name, layer in linear_layers(found).items()}


def torchao(work: Work, bits: int, group_size: int, symmetric: bool, rate: float) -> Made:
    """Quantization-aware training with torchao's fake quantizers in this project's loop: the same
    text, cached teacher, loss and schedule as its own recipes."""
    with work.clock.aside():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
        from torchao.quantization.quant_primitives import ZeroPointDomain
    model = work.teacher()
    names = set(linear_layers(model))
    config = IntxFakeQuantizeConfig(
        getattr(torch, f"int{bits}" if symmetric else f"uint{bits}"),
        group_size=group_size,
        is_symmetric=symmetric,
        scale_precision=torch.float16,
        zero_point_precision=torch.int32 if symmetric else torch.float16,
        zero_point_domain=ZeroPointDomain.INT if symmetric else ZeroPointDomain.FLOAT,
    )
    quantize_(
        model,
        QATConfig(weight_config=config, step="prepare"),
        filter_fn=lambda _module, name: name in names,
    )

    def trainables(of: PreTrainedModel) -> list[Trainable]:
        of.requires_grad_(False)
        layers = {name: of.get_submodule(name) for name in sorted(names)}
        # the loop knows masters of its own layers only; these are any parameters to it
        return [
            Trainable(
                f"{name}.weight",
                layer.weight.requires_grad_(),
                ParameterRole.ADAPTER,
                layer,
                "weight",
            )
            for name, layer in layers.items()
        ]

    section = Tuning(rate=rate, schedule="cosine", warmup_steps=4)
    run = train(work, model, [section], trainables)
    with torch.no_grad():
        weights = {}
        for name in sorted(names):
            layer = model.get_submodule(name)
            weights[name] = layer.weight_fake_quantizer(layer.weight).detach().float()
    zero_bits = 0 if symmetric else FP16
    return _made(weights, integers(bits, group_size, zero_bits=zero_bits), **run)
