"""Sections of quantization, distillation and the training stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params.base import (
    Count,
    CountOrZero,
    LutSize,
    LutSizeOrSame,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
)

Range = Annotated[float, Field(gt=0, le=1)]
Init = Literal[
    "maxabs",
    "range",
    "importance",
    "gptq",
    "importance+gptq",
    "range+importance",
    "range+gptq",
    "range+importance+gptq",
]


class Calibrate(Section):
    """How the teacher uses the inputs of each layer, which starts other than `maxabs` go by.

    `importance` needs E[x^2] of each input, `range` and `gptq` E[x x^T]: a matrix per layer, all of
    them in memory while they are summed. What no `init` needs is not measured.
    """

    sequences: Count = 64
    """Training sequences, the first ones."""


class Quant(Section):
    """How linear layers are quantized before training: `W_q = LUT[idx] * S`."""

    lut_size: LutSize = 16
    """LUT entries of the MLPs: a power of two, 2 to 256 (16 = 4 bits, 4 = 2 bits)."""
    attention_lut_size: LutSizeOrSame = 0
    """LUT entries of q, k, v, o; 0 = the same as the MLPs."""
    rank: Count = 4
    """Rank of the scale matrix S of the MLPs; ignored by `group` and `channel` scales."""
    attention_rank: CountOrZero = 0
    """Rank of S in attention; 0 = the same as the MLPs; ignored by `group` and `channel` scales."""
    group_size: Count = 32
    """Inputs that share a max-abs when S is initialized; with `group` scales those that share a
    scale; ignored by `channel` scales. Default: the reference, end to end."""
    attention_group_size: CountOrZero = 0
    """The same for attention; 0 = the same as the MLPs."""
    attention: bool = True
    """Quantize q, k, v, o as well; false leaves them at the teacher's precision."""
    scale: Literal["lowrank", "directional", "group", "channel"] = "lowrank"
    """`lowrank`: S = A @ B (4-bit training); `directional`: unit directions times magnitudes;
    `group`: one scale per `group_size` inputs of an output (w4g64 and the like); `channel`: one
    scale per output, one clip factor per layer (Apple's 2-bit training)."""
    codebook: Literal["uniform", "balanced", "kmeans", "learned"] = "uniform"
    """Where the LUT values come from: linspace(-1, 1), half-integer levels, k-means on W / S, or
    trained (needs a `rates.lut` above 0 in some training stage to move)."""
    init: Init = "maxabs"
    """How S and the indices start. `maxabs`: S from a truncated SVD of the groups' max-abs, nearest
    levels (the reference). `range`: that S times the share, per layer, of least output error,
    instead of the key `range`. `importance`: from there, indices and scales are refitted in turn to
    the weight, each input weighted by how much it is used (E[x^2] over calibration text). `gptq`:
    indices by error feedback (GPTQ) under that S. `a+b`: one after the other."""
    refit_steps: Count = 5
    """With `importance` only: alternating refits per layer."""
    descent_steps: CountOrZero = 2
    """With `gptq` only: rounds of coordinate descent over the indices afterwards; each takes half
    as long as the feedback."""
    range: Range = 1.0
    """Share of a group's max-abs that the outermost level stands for; below 1 clips outliers. Not
    used where `init` has `range`. Of `channel` scales the start of the clip factor, of an output's
    max-abs."""
    ste_fp16: bool = True
    """Round LUT and scales to FP16 in the forward pass; gradients pass through."""
    seed: Seed = 0
    """Seed of everything random in the initialization."""

    @model_validator(mode="after")
    def _attention_settings(self) -> Self:
        _refuse_attention_settings(self, "quant", quantized=self.attention)
        return self


class Distill(Section):
    """The distillation loss, shared by every training stage."""

    source: Literal["cache", "teacher"] = "cache"
    """`cache`: the teacher's stored top-k; `teacher`: the teacher runs in every step, on all of
    `tokens.train` and over the whole vocabulary. The cache judges held-out text either way."""
    temperature: Positive = 2.0
    """Temperature T of both softmaxes; the loss is scaled by T squared (Hinton et al. 2015)."""
    target: Literal["candidates", "tail"] = "candidates"
    """Of the cache. `candidates`: renormalized over the cached candidates; `tail`: everything else
    is one more class, from the cached log-sum-exp."""


class Rates(Section):
    """Learning rate per parameter role; 0 freezes the role."""

    weight: NotNegative = 0.0
    """FP32 master weights, through the straight-through estimator."""
    scale_direction: NotNegative = 0.0
    """A and B of the scales, or their unit directions, or the scales of groups or outputs."""
    scale_magnitude: NotNegative = 0.0
    """Magnitudes g of directional scales, clip factors f of channel ones; other forms have none."""
    lut: NotNegative = 0.0
    """LUT values; the codebook must be `learned`."""

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError(
                "weight, scale_direction, scale_magnitude and lut are all 0: every role is frozen; "
                "set at least one of these rates above 0"
            )
        return self


class LoopConfig(Section):
    """One run of the training loop, whatever trains in it."""

    steps: CountOrZero = 1000
    """Optimizer steps; 0 hands the model on as it came."""
    batch_size: Count = 4
    """Sequences per forward pass."""
    grad_accum: Count = 1
    """Forward passes per optimizer step."""
    distill_weight: Share = 1.0
    """Share of the distillation loss; the rest is cross entropy on the labels."""
    hard_top1_weight: NotNegative = 0.0
    """Weight of the cross entropy on the teacher's top-1 within the candidates."""
    hard_full_weight: NotNegative = 0.0
    """Weight of the cross entropy on the teacher's top-1 over the full vocabulary."""
    weight_decay: NotNegative = 0.0
    """AdamW weight decay. Default: the reference."""
    warmup_steps: CountOrZero = 0
    """Steps over which the rates rise from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the rates after warm-up."""
    min_rate_ratio: Share = 0.1
    """Where `cosine` ends, as a share of the rate. Default: the reference's 10 %."""
    clip: NotNegative = 1.0
    """Largest gradient norm; 0 = no clipping. Default: the reference."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average that is evaluated and saved, the plain parameters beside it;
    0 = none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Type of the matrix products; master weights stay FP32. `auto`: bf16 where the device has
    instructions for it (AVX512-BF16, AMX, CUDA), else fp32. `fp16` needs CUDA or MPS."""
    eval_every: Count = 100
    """Steps between two evaluations of the held-out loss; the best is what is saved."""
    eval_sequences: Count = 64
    """Val sequences per evaluation (all, if there are fewer)."""
    checkpoint_every: Count = 100
    """Steps between two states that a killed run resumes from."""
    seed: Seed = 0
    """Seed of the order of the data."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps}: must be at most steps = {self.steps}; "
                "lower it or train longer"
            )
        return self

    @abstractmethod
    def rate_of(self, role: str) -> float:
        """Learning rate of a parameter role; 0 freezes it."""


class TrainConfig(LoopConfig):
    """A run that trains the quantized model itself; every training stage has such a section."""

    rates: Rates
    """Which roles train, and how fast."""
    train_mlp_only: bool = False
    """Freeze all of attention."""
    freeze_value_output: bool = False
    """Freeze the v and o projections."""
    freeze_last_mlp: CountOrZero = 0
    """Freeze the MLPs of so many last layers."""

    def rate_of(self, role: str) -> float:
        """The rate in `rates`; roles that are not there do not train."""
        return float(getattr(self.rates, role, 0.0))


Regularizer = Literal["none", "prox"]
"""What is added to the loss of a run."""

Method = Literal["e2e", "layerwise", "blockwise"]
"""How a model trains: end to end, or one decoder block after the other."""


class Scales(TrainConfig):
    """Indices frozen, scales learn."""

    method: Method = "e2e"
    """`e2e`: the whole model; `layerwise` (section `layerwise`, `steps` per layer): each layer by
    its MLP's outputs and the whole model's; `blockwise` (section `blockwise`, which counts epochs
    instead of steps): each block by its outputs."""

    rates: Rates = Rates(scale_direction=1e-3, scale_magnitude=1e-3)
    """Default: the reference's scale rate."""


class Weights(TrainConfig):
    """Scales frozen, weights learn."""

    method: Method = "e2e"
    """As in `scales`."""
    regularizer: Regularizer = "none"
    """`prox` (section `prox`): the weights train as floats and are pulled to their grid."""

    rates: Rates = Rates(weight=5e-6)
    """Default: the reference's weight rate, for thousands of steps."""
    seed: Seed = 1
    """Seed of the order of the data: another one than before, or a stage sees the same again."""
    hard_top1_weight: NotNegative = 0.1
    """Default: the reference."""
    hard_full_weight: NotNegative = 5e-4
    """Default: the reference."""


class Finetune(TrainConfig):
    """Both learn, at a low rate."""

    rates: Rates = Rates(weight=1e-6, scale_direction=1e-6, scale_magnitude=1e-6)
    """Default: the reference's fine-tune rate."""
    seed: Seed = 2
    """Seed of the order of the data: another one than before, or a stage sees the same again."""


class FinetuneQ2(TrainConfig):
    """Training after the conversion to fewer bits."""

    steps: CountOrZero = 4000
    """Optimizer steps; 0 hands the model on. Default: the reference's progressive run."""
    rates: Rates = Rates(weight=5e-5, scale_direction=5e-5, scale_magnitude=5e-5)
    """Default: the reference's rate after conversion."""
    seed: Seed = 3
    """Seed of the order of the data: another one than before, or a stage sees the same again."""
    warmup_steps: CountOrZero = 100
    """Steps over which the rates rise from 0. Default: the reference."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Course of the rates after warm-up. Default: the reference."""
    hard_top1_weight: NotNegative = 0.1
    """Default: the reference."""
    hard_full_weight: NotNegative = 5e-4
    """Default: the reference."""


class Convert(Section):
    """To fewer LUT entries and a higher rank, indices and scales refitted."""

    source: Literal["trained", "teacher"] = "trained"
    """What is quantized anew. `trained`: what the model at more bits computes with; a layer that is
    already as small as asked is left as it is. `teacher`: the teacher's weights, in every layer, as
    if there had been no model at more bits."""
    lut_size: LutSize = 4
    """LUT entries of the MLPs afterwards."""
    attention_lut_size: LutSizeOrSame = 16
    """LUT entries of q, k, v, o afterwards; 0 = the same as the MLPs."""
    rank: Count = 32
    """Rank of S of the MLPs afterwards; ignored by `group` and `channel` scales."""
    attention_rank: CountOrZero = 8
    """Rank of S in attention afterwards; 0 = the same as the MLPs; ignored as there."""
    group_size: Count = 32
    """Inputs per group where scales start anew. `group` scales that stay must have it already."""
    range: Range = 1.0
    """Share of a group's max-abs that the outermost level stands for; below 1 clips outliers."""
    scale: Literal["lowrank", "directional", "group", "channel"] = "directional"
    """Form of S afterwards; layers that keep their levels can be `group` or `channel` only if they
    were before."""
    codebook: Literal["uniform", "balanced", "kmeans", "learned"] = "uniform"
    """Where the new LUT values come from."""
    init: Init = "importance"
    """How the new scales and indices start, as `quant.init`."""
    refit_steps: Count = 5
    """With `importance` only: alternating refits of indices and scales per layer."""
    descent_steps: CountOrZero = 2
    """With `gptq` only: rounds of coordinate descent over the new indices afterwards."""
    eval_sequences: Count = 64
    """Val sequences on which the KD loss before and after is measured."""
    seed: Seed = 0
    """Seed of everything random in the conversion."""


def _refuse_attention_settings(section: Quant | Convert, name: str, *, quantized: bool) -> None:
    """Refuse a setting that would be ignored because attention is not quantized."""
    for key in ("attention_lut_size", "attention_rank", "attention_group_size"):
        if quantized or key not in section.model_fields_set:
            continue
        if value := getattr(section, key):
            raise ValueError(
                f"{name}.{key} = {value}: attention is not quantized (quant.attention is false); "
                "set it to 0 or quant.attention to true"
            )


def check_convert(quant: Quant, convert: Convert) -> None:
    """Rules between `quant` and `convert`.

    Raises:
        ValueError: an attention setting of `convert` without attention being quantized, or scales
            per group or output for layers that keep other scales.
    """
    _refuse_attention_settings(convert, "convert", quantized=quant.attention)
    if convert.source == "teacher":
        return
    for kind in ("", "attention_") if quant.attention else ("",):
        _refuse_new_form(quant, convert, f"{kind}lut_size", f"{kind}group_size")


def _refuse_new_form(quant: Quant, convert: Convert, levels: str, group: str) -> None:
    """Refuse scales without ranks for layers that keep their levels, and with them their scales."""
    before, after = (getattr(part, levels) or part.lut_size for part in (quant, convert))
    if convert.scale not in ("group", "channel") or after < before:
        return
    key = "group_size" if quant.scale == convert.scale == "group" else "scale"
    asked = getattr(convert, key)
    has = (getattr(quant, group) or quant.group_size) if key == "group_size" else quant.scale
    if asked != has:
        raise ValueError(
            f"convert.{key} = {asked}: layers that keep their {before} levels keep their scales, "
            f"whose {key} is {has}; set it to {has}, or convert.{levels} below {before}"
        )


def check_training(name: str, config: TrainConfig, codebook: str, *, attention: bool) -> None:
    """Rules between a training section `name` and the model it trains.

    Raises:
        ValueError: the LUT has a rate but is not learned, or frozen attention parts are named
            though attention is not quantized.
    """
    if config.rates.lut and codebook != "learned":
        owner = "convert" if name == "finetune_q2" else "quant"
        raise ValueError(
            f"{name}.rates.lut = {config.rates.lut}: a {codebook} LUT does not train; "
            f"set it to 0 or {owner}.codebook to learned"
        )
    if config.freeze_value_output and not attention:
        raise ValueError(
            f"{name}.freeze_value_output = true: attention is not quantized (quant.attention is "
            "false), so it never trains; set it to false"
        )


def check_source(distill: Distill, sections: Mapping[str, TrainConfig]) -> None:
    """Rules between `distill.source` and training sections by name.

    Raises:
        ValueError: the teacher is to be asked itself, and a section needs its cache.
    """
    if distill.source == "cache":
        return
    for name, config in sections.items():
        if isinstance(config, Scales | Weights) and config.method != "e2e":
            raise ValueError(
                f"{name}.method = {config.method}: distill.source is teacher, which trains end to "
                "end only; set it to e2e, or distill.source to cache"
            )
        if config.hard_top1_weight and config.steps:
            raise ValueError(
                f"{name}.hard_top1_weight = {config.hard_top1_weight}: distill.source is teacher, "
                "which has no candidates; set it to 0 and use hard_full_weight, or distill.source "
                "to cache"
            )
