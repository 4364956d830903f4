"""From params sections to the descriptions that the quantizer works with."""

from __future__ import annotations

from lib.params.training import Convert, Quant
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm


def model_spec(quant: Quant) -> ModelSpec:
    """Specs of MLP and attention layers; an attention value of 0 means "the same as the MLPs"."""
    refits = quant.refit_steps if quant.init == "importance" else 0
    mlp = LinearSpec(
        lut_size=quant.lut_size,
        rank=quant.rank,
        group_size=quant.group_size,
        scale=ScaleForm(quant.scale),
        codebook=Codebook(quant.codebook),
        range=quant.range,
        ste_fp16=quant.ste_fp16,
        refit_steps=refits,
    )
    attention = LinearSpec(
        lut_size=quant.attention_lut_size or quant.lut_size,
        rank=quant.attention_rank or quant.rank,
        group_size=quant.attention_group_size or quant.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=quant.range,
        ste_fp16=quant.ste_fp16,
        refit_steps=refits,
    )
    return ModelSpec(
        mlp=mlp,
        attention=attention if quant.attention else None,
        calibration_sequences=quant.calibration_sequences if refits else 0,
        seed=quant.seed,
    )


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
        refit_steps=convert.refit_steps,
    )
    attention = LinearSpec(
        lut_size=convert.attention_lut_size or convert.lut_size,
        rank=convert.attention_rank or convert.rank,
        group_size=convert.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=convert.range,
        ste_fp16=ste_fp16,
        refit_steps=convert.refit_steps,
    )
    return ModelSpec(
        mlp=mlp,
        attention=attention,
        calibration_sequences=convert.calibration_sequences,
        seed=convert.seed,
    )
