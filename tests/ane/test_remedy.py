"""Plain norms on a residual stream that passes 255, and what is done about it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from lib.ane.check import run_check
from lib.ane.judge import Kind
from lib.ane.norms import NormForm
from lib.ane.products import MATMUL_LIMIT, Mode
from lib.ane.spec import Remedy
from lib.model.surgery import quantized_layers
from lib.quant.fp16 import FP16_MAX
from tests.ane.tiny import check_spec, snapped_model, token_sequences, with_large_residual

PLAIN = {"norm": NormForm.PLAIN}


def _overflowing() -> PreTrainedModel:
    """A model whose residual stream passes 65504 in block 0; each constant fits FP16."""
    model = snapped_model()
    with torch.no_grad():
        layer = quantized_layers(model)["model.layers.0.mlp.down_proj"]
        layer.lut.mul_(2.0**6)
        layer.scale.g.mul_(2.0**10)
    return model


def test_a_plain_norm_is_caught_though_every_logit_is_finite() -> None:
    result = run_check(with_large_residual(), token_sequences(), check_spec(**PLAIN))
    assert not result.passed
    for modes in result.forms.values():
        assert modes[Mode.WIDE].non_finite_logits == 0
        assert math.isfinite(modes[Mode.WIDE].perplexity)
    failure = result.failures[0]
    assert failure.layer == "model.layers.0.input_layernorm"
    assert failure.kind is Kind.OVERFLOW
    peak = result.norm_peaks[failure.layer]
    assert peak > 256
    assert f"largest |input| {peak:.6g}" in str(failure)
    assert "ane_check.norm: prescaled" in failure.remedy
    assert "ane_check.remedy: alpha" in failure.remedy


def test_prescaled_norms_pass_and_the_form_is_named() -> None:
    result = run_check(with_large_residual(), token_sequences(), check_spec())
    assert result.passed, result.failures
    warning = next(w for w in result.warnings if "plain x^2" in w)
    assert "norm" in warning.split(":")[0]
    assert max(result.norm_peaks.values()) > 256


def test_plain_norms_pass_on_a_small_residual() -> None:
    """Negative control: it is the size of the stream that is caught, not the form."""
    result = run_check(snapped_model(), token_sequences(), check_spec(**PLAIN))
    assert result.passed, result.failures
    assert max(result.norm_peaks.values()) < 255


def test_alpha_saves_plain_norms() -> None:
    spec = check_spec(remedy=Remedy.ALPHA, **PLAIN)
    model = with_large_residual()
    result = run_check(model, token_sequences(), spec)
    assert result.passed, result.failures
    assert result.remedy is not None
    assert result.remedy.before
    assert result.remedy.after == []
    assert result.alpha == result.remedy.alpha < 1
    assert max(result.norm_peaks.values()) <= 128
    twice = max(
        run_check(with_large_residual(), token_sequences(), check_spec()).norm_peaks.values()
    )
    assert twice * result.alpha * 2 > 127  # the largest power of two that does it


def test_alpha_saves_a_stream_that_passes_fp16() -> None:
    before = run_check(_overflowing(), token_sequences(), check_spec())
    assert not before.passed
    assert not before.constants.faults
    assert {f.kind for f in before.failures} == {Kind.OVERFLOW}  # and nothing that follows
    told = [f for f in before.failures if f.remedy]
    assert {"model.layers.0.mlp.down_proj"} <= {f.layer for f in told}
    for failure in told:
        assert "ane_check.remedy: alpha" in failure.remedy
        assert "ane_check.norm: prescaled" in failure.remedy
    after = run_check(_overflowing(), token_sequences(), check_spec(remedy=Remedy.ALPHA))
    assert after.passed, after.failures
    assert after.alpha < 1
    assert [str(f) for f in after.remedy.before] == [str(f) for f in before.failures]


def test_alpha_leaves_a_margin_below_the_bound_of_products() -> None:
    """Half of 65504 is 32752, the bound itself: mode bounded takes half of that."""
    alphas = {}
    for modes in ((Mode.WIDE,), (Mode.WIDE, Mode.BOUNDED)):
        spec = check_spec(remedy=Remedy.ALPHA, modes=modes)
        result = run_check(_overflowing(), token_sequences(), spec)
        assert result.passed, result.failures
        alphas[modes] = result.alpha
        peak = next(
            record.max_abs
            for record in result.forms["baked"][Mode.WIDE].records
            if record.module == "model.layers.0.mlp.down_proj" and record.is_matmul
        )
        limit = MATMUL_LIMIT if Mode.BOUNDED in modes else FP16_MAX
        assert limit / 4 < peak <= limit / 2
    wide, bounded = alphas.values()
    assert bounded == wide / 2


def test_alpha_is_left_alone_where_nothing_overflows() -> None:
    spec = check_spec(max_kl=1e-12, remedy=Remedy.ALPHA)
    result = run_check(snapped_model(), token_sequences(), spec)
    assert not result.passed
    assert result.remedy is None
    assert result.alpha == 1.0


def test_alpha_does_not_help_outside_the_stream() -> None:
    model = snapped_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0**14)
    spec = check_spec(remedy=Remedy.ALPHA)
    result = run_check(model, token_sequences(), spec)
    assert not result.passed
    assert result.remedy is not None
    assert result.alpha == 1.0
    assert "not scaled by alpha" in result.remedy.note
    assert result.remedy.after == result.remedy.before == result.failures


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_norm_beside_the_stream_is_not_offered_alpha(name: str) -> None:
    model = snapped_model("qwen3")
    projection = f"model.layers.0.self_attn.{name[0]}_proj"
    with torch.no_grad():
        quantized_layers(model)[projection].scale.g.mul_(2.0**8)
    result = run_check(model, token_sequences(), check_spec(**PLAIN))
    failure = next(f for f in result.failures if f.layer.endswith(name))
    assert "ane_check.norm: prescaled" in failure.remedy
    assert "alpha" not in failure.remedy


def test_an_unknown_stream_is_said() -> None:
    model = with_large_residual()
    block = model.model.layers[0]
    block.extra_norm = type(block.input_layernorm)(64, eps=1e-6)
    result = run_check(model, token_sequences(), check_spec(remedy=Remedy.ALPHA, **PLAIN))
    assert not result.passed
    assert result.remedy is not None
    assert "extra_norm" in result.remedy.note


def test_errors_of_layers_are_those_of_a_smaller_stream() -> None:
    """What o_proj and down_proj compute is smaller by alpha, and compared with that."""
    spec = check_spec(remedy=Remedy.ALPHA, **PLAIN)
    result = run_check(with_large_residual(), token_sequences(), spec)
    for modes in result.forms.values():
        assert all(0 < error < 0.05 for error in modes[Mode.WIDE].errors.values())
