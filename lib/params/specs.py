"""From params sections to the descriptions that the quantizer works with."""

from __future__ import annotations

from enum import StrEnum

from lib.params.training import Convert, Init, Quant
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm


class Moments(StrEnum):
    """What is to be known of a layer's inputs."""

    NONE = "none"
    SQUARES = "squares"
    """E[x^2] of each."""
    PRODUCTS = "products"
    """E[x x^T]."""


def _refits(init: Init) -> bool:
    return "importance" in init.split("+")


def _feedback(init: Init) -> bool:
    return "gptq" in init.split("+")


def moments_needed(*inits: Init) -> Moments:
    """The most that one of these starts asks for."""
    if any(map(_feedback, inits)):
        return Moments.PRODUCTS
    return Moments.SQUARES if any(map(_refits, inits)) else Moments.NONE


def model_spec(quant: Quant) -> ModelSpec:
    """Specs of MLP and attention layers; an attention value of 0 means "the same as the MLPs"."""
    mlp = LinearSpec(
        lut_size=quant.lut_size,
        rank=quant.rank,
        group_size=quant.group_size,
        scale=ScaleForm(quant.scale),
        codebook=Codebook(quant.codebook),
        range=quant.range,
        ste_fp16=quant.ste_fp16,
        refit_steps=quant.refit_steps if _refits(quant.init) else 0,
        feedback=_feedback(quant.init),
    )
    attention = LinearSpec(
        lut_size=quant.attention_lut_size or quant.lut_size,
        rank=quant.attention_rank or quant.rank,
        group_size=quant.attention_group_size or quant.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=quant.range,
        ste_fp16=quant.ste_fp16,
        refit_steps=quant.refit_steps if _refits(quant.init) else 0,
        feedback=_feedback(quant.init),
    )
    return ModelSpec(mlp=mlp, attention=attention if quant.attention else None, seed=quant.seed)


def target_spec(convert: Convert, ste_fp16: bool) -> ModelSpec:
    """What :mod:`lib.convert` turns a model into."""
    mlp = LinearSpec(
        lut_size=convert.lut_size,
        rank=convert.rank,
        group_size=convert.group_size,
        scale=ScaleForm(convert.scale),
        codebook=Codebook(convert.codebook),
        range=convert.range,
        ste_fp16=ste_fp16,
        refit_steps=convert.refit_steps if _refits(convert.init) else 0,
        feedback=_feedback(convert.init),
    )
    attention = LinearSpec(
        lut_size=convert.attention_lut_size or convert.lut_size,
        rank=convert.attention_rank or convert.rank,
        group_size=convert.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=convert.range,
        ste_fp16=ste_fp16,
        refit_steps=convert.refit_steps if _refits(convert.init) else 0,
        feedback=_feedback(convert.init),
    )
    return ModelSpec(mlp=mlp, attention=attention, seed=convert.seed)
