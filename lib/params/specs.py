"""From params sections to the descriptions that the quantizer works with."""

from __future__ import annotations

from typing import Any

from lib.params.training import Convert, Init, Quant
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, Moments, ScaleForm

_PRODUCTS = {"range", "gptq"}


def moments_needed(*inits: Init) -> Moments:
    """The most that one of these starts asks for."""
    parts = {part for init in inits for part in init.split("+")}
    if parts & _PRODUCTS:
        return Moments.PRODUCTS
    return Moments.SQUARES if "importance" in parts else Moments.NONE


def _start(section: Quant | Convert) -> dict[str, Any]:
    """What `init` says."""
    parts = section.init.split("+")
    return {
        "refit_steps": section.refit_steps if "importance" in parts else 0,
        "feedback": "gptq" in parts,
        "descent_steps": section.descent_steps if "gptq" in parts else 0,
        "search_range": "range" in parts,
    }


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
        **_start(quant),
    )
    attention = LinearSpec(
        lut_size=quant.attention_lut_size or quant.lut_size,
        rank=quant.attention_rank or quant.rank,
        group_size=quant.attention_group_size or quant.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=quant.range,
        ste_fp16=quant.ste_fp16,
        **_start(quant),
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
        **_start(convert),
    )
    attention = LinearSpec(
        lut_size=convert.attention_lut_size or convert.lut_size,
        rank=convert.attention_rank or convert.rank,
        group_size=convert.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=convert.range,
        ste_fp16=ste_fp16,
        **_start(convert),
    )
    return ModelSpec(mlp=mlp, attention=attention, seed=convert.seed)
