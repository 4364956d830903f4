"""Which failures are told that alpha helps: those that it makes smaller, and no others."""

from __future__ import annotations

import pytest
import torch

from lib.ane.check import run_check
from lib.ane.constants import Constants
from lib.ane.emulate import OpRecord
from lib.ane.forms import BAKED, FACTORED, FormResult
from lib.ane.judge import Judge
from lib.ane.norms import SQUARE, NormForm
from lib.ane.products import Mode
from lib.ane.spec import Remedy
from lib.model.rescale import residual_stream
from lib.model.surgery import quantized_layers
from tests.ane.tiny import check_spec, snapped_model, token_sequences

O_PROJ = "model.layers.0.self_attn.o_proj"
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.input_layernorm"
SOUND = Constants(layers=14, entries=1, subnormal=0, faults={})


@pytest.mark.parametrize(
    ("form", "module", "op", "is_quantized", "helps"),
    [
        (FACTORED, O_PROJ, "mm", True, False),  # Q @ (b * x), before A
        (FACTORED, DOWN, "mm", True, False),
        (FACTORED, DOWN, "sum", True, True),
        (FACTORED, DOWN, "add", True, True),
        (FACTORED, DOWN, "mm", False, True),  # dense in this form too
        (BAKED, DOWN, "mm", True, True),  # the weight holds A
        (FACTORED, "model.layers.0", "add", True, True),
        (FACTORED, UP, "sum", True, False),
        (FACTORED, NORM, SQUARE, True, True),
        (FACTORED, NORM, "mul", True, False),  # the gain comes after the norm
        (FACTORED, "lm_head", "mm", True, False),
    ],
)
def test_alpha_is_named_where_it_helps(
    form: str, module: str, op: str, is_quantized: bool, helps: bool
) -> None:
    model = snapped_model()
    judge = Judge(
        spec=check_spec(norm=NormForm.PLAIN),
        stream=residual_stream(model),
        quantized=frozenset(quantized_layers(model) if is_quantized else ()),
    )
    record = OpRecord(module, op, max_abs=1e5, overflows=1)
    result = FormResult(kl=0.0, top1=1.0, records=[record], norm_inputs={NORM: 1e3})
    (failure,) = judge.failures(SOUND, {form: {Mode.WIDE: result}}, [])
    assert failure.layer == module
    assert ("ane_check.remedy: alpha" in failure.remedy) is helps


def test_a_product_before_the_factor_is_not_offered_alpha() -> None:
    """Q @ (b * x) passes 65504, A makes it small again: no alpha changes that."""
    model = snapped_model()
    layer = quantized_layers(model)[DOWN]
    with torch.no_grad():
        quantized_layers(model)[UP].scale.g.mul_(2.0**10)
        layer.lut.mul_(2.0**15)
        layer.scale.g.mul_(2.0**-15)
    for remedy in Remedy:
        result = run_check(model, token_sequences(), check_spec(remedy=remedy))
        (failure,) = (f for f in result.failures if f.layer == DOWN and f.form == FACTORED)
        assert "mm reaches" in failure.why
        assert failure.remedy == ""
