"""From params sections to the descriptions that the quantizer works with."""

from __future__ import annotations

from lib.params.training import Convert, Quant
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm


def _refits(section: Quant | Convert) -> int:
    return section.refit_steps if "importance" in section.init.split("+") else 0


def _feedback(section: Quant | Convert) -> bool:
    return "gptq" in section.init.split("+")


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
        refit_steps=_refits(quant),
        feedback=_feedback(quant),
    )
    attention = LinearSpec(
        lut_size=quant.attention_lut_size or quant.lut_size,
        rank=quant.attention_rank or quant.rank,
        group_size=quant.attention_group_size or quant.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=quant.range,
        ste_fp16=quant.ste_fp16,
        refit_steps=_refits(quant),
        feedback=_feedback(quant),
    )
    return ModelSpec(
        mlp=mlp,
        attention=attention if quant.attention else None,
        calibration_sequences=0 if quant.init == "maxabs" else quant.calibration_sequences,
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
        refit_steps=_refits(convert),
        feedback=_feedback(convert),
    )
    attention = LinearSpec(
        lut_size=convert.attention_lut_size or convert.lut_size,
        rank=convert.attention_rank or convert.rank,
        group_size=convert.group_size,
        scale=mlp.scale,
        codebook=mlp.codebook,
        range=convert.range,
        ste_fp16=ste_fp16,
        refit_steps=_refits(convert),
        feedback=_feedback(convert),
    )
    return ModelSpec(
        mlp=mlp,
        attention=attention,
        calibration_sequences=convert.calibration_sequences,
        seed=convert.seed,
    )
