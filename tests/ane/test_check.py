"""The gate: what passes, and each fault with the layer that it must name."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from lib.ane.check import CheckResult, run_check
from lib.ane.constants import check_constants
from lib.ane.forms import FormResult, causal_mask
from lib.ane.judge import Kind
from lib.ane.products import Mode
from lib.ane.spec import CheckSpec
from lib.base.errors import InputError, MismatchError
from lib.model.surgery import quantized_layers
from lib.quant.spec import ScaleForm
from tests.ane.tiny import check_spec, snapped_model, token_sequences

DOWN = "model.layers.1.mlp.down_proj"


def _check(model: PreTrainedModel, spec: CheckSpec | None = None) -> CheckResult:
    return run_check(model, token_sequences(), spec or check_spec())


def _wide(result: CheckResult, form: str = "baked") -> FormResult:
    return result.forms[form][Mode.WIDE]


@pytest.mark.parametrize("form", ScaleForm)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_sound_model_passes(kind: str, form: ScaleForm) -> None:
    result = _check(snapped_model(kind, scale=form))
    assert result.passed, result.failures
    assert list(result.forms) == ["factored", "baked"]
    assert result.tokens == 24 + 23
    assert result.constants.layers == 14
    assert result.alpha == 1.0
    for form in result.forms:
        values = _wide(result, form)
        assert 0 < values.kl < 0.02
        assert values.perplexity == pytest.approx(result.reference_perplexity, rel=0.02)
        assert values.non_finite_logits == 0
        assert set(values.errors) == set(quantized_layers(snapped_model(kind)))
        assert all(0 < error < 0.05 for error in values.errors.values())
    assert not any("plain x^2" in warning for warning in result.warnings)


def test_a_baked_checkpoint_has_one_form() -> None:
    result = _check(snapped_model(baked=True))
    assert result.passed
    assert list(result.forms) == ["baked"]


def test_reference_is_plain_float32() -> None:
    """The reference must not see the deployed mask or norms: same model, plain forward."""
    model, ids = snapped_model(), token_sequences()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(x[None]).logits[0, :-1], x[1:], reduction="sum")
            for x in ids
        ]
    expected = math.exp(float(torch.stack(losses).sum()) / sum(len(x) - 1 for x in ids))
    assert _check(model).reference_perplexity == pytest.approx(expected, rel=1e-5)


def test_the_model_is_afterwards_what_it_was() -> None:
    model, ids = snapped_model(), token_sequences()[0][None]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1 / 3  # which a deployed graph would round
        model.set_attn_implementation("eager")
        before = model(ids).logits
        run_check(model, token_sequences(), check_spec())
        assert torch.equal(model(ids).logits, before)


def test_overflow_fails_with_the_layer_named() -> None:
    model = snapped_model()
    layer = quantized_layers(model)[DOWN]
    with torch.no_grad():
        layer.lut.mul_(2.0**10)
        layer.scale.g.mul_(2.0**8)
    result = _check(model)
    assert not result.passed
    assert not result.constants.faults  # each constant fits: only the products do not
    assert {failure.form for failure in result.failures} == {"factored", "baked"}
    assert result.failures[0].layer == DOWN
    assert result.failures[0].kind is Kind.OVERFLOW
    assert "above 65504" in result.failures[0].why


def test_a_magnitude_that_overflows_its_direction_fails() -> None:
    """a and g fit FP16 each; the deployed constant a * g does not."""
    model = snapped_model()
    layer = quantized_layers(model)[DOWN]
    with torch.no_grad():
        layer.scale.a.mul_(2.0**13)
        layer.scale.g.mul_(2.0**6)
    assert "A * g" in check_constants(quantized_layers(model)).faults[DOWN]


@pytest.mark.parametrize(
    ("value", "problem"),
    [(0.1, "not FP16 values"), (math.inf, "non-finite"), (1.0, "equal in FP16")],
)
def test_a_bad_lut_entry_fails_with_the_layer_named(value: float, problem: str) -> None:
    model = snapped_model()
    with torch.no_grad():
        quantized_layers(model)[DOWN].lut[0] = value
    constants = check_constants(quantized_layers(model))
    assert list(constants.faults) == [DOWN]
    assert problem in constants.faults[DOWN]
    result = _check(model)
    assert result.failures[0].layer == DOWN
    assert result.failures[0].form == "constants"


def test_inexact_scale_fails() -> None:
    model = snapped_model()
    with torch.no_grad():
        quantized_layers(model)[DOWN].scale.b[0, 0] = 1 / 3
    assert "scale b" in check_constants(quantized_layers(model)).faults[DOWN]


def test_subnormal_constants_are_counted() -> None:
    model = snapped_model()
    before = check_constants(quantized_layers(model)).subnormal
    with torch.no_grad():
        quantized_layers(model)[DOWN].scale.a[0, 0] = 2.0**-20
    after = check_constants(quantized_layers(model))
    assert after.subnormal == before + 1
    assert not after.faults


def test_a_limit_on_kl_and_top1_names_a_layer() -> None:
    result = _check(snapped_model(), check_spec(max_kl=1e-12, min_top1=1.01))
    assert len(result.failures) == 4  # both limits in both forms
    names = set(quantized_layers(snapped_model()))
    assert {failure.layer for failure in result.failures} <= names
    assert "max_kl" in result.failures[0].why
    assert "min_top1" in result.failures[1].why


def test_nan_is_a_failure_with_its_source() -> None:
    model = snapped_model()
    with torch.no_grad():
        quantized_layers(model)[DOWN].scale.a[0, 0] = math.nan
    result = _check(model)
    sources = {f.form: f.layer for f in result.failures}
    assert sources["baked"] == DOWN
    assert math.isnan(_wide(result).kl)


def test_a_changed_index_changes_kl() -> None:
    """Negative control: the gate sees the indices, not only the scales."""
    kl = _wide(_check(snapped_model())).kl
    model = snapped_model()
    with torch.no_grad():
        quantized_layers(model)[DOWN].indices[0, 0] ^= 15
    assert _wide(_check(model)).kl != kl


def test_mask_is_finite_and_hides_the_future() -> None:
    mask = causal_mask(5, torch.device("cpu"))
    assert torch.isfinite(mask.half()).all()
    weights = (torch.zeros(1, 1, 5, 5) + mask).softmax(-1)[0, 0]
    assert torch.equal(weights, torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None])


def test_no_usable_sequence() -> None:
    with pytest.raises(InputError, match="at least 2 tokens"):
        run_check(snapped_model(), [torch.tensor([3])], check_spec())


def test_a_token_outside_the_vocabulary() -> None:
    with pytest.raises(MismatchError, match="token 288"):
        run_check(snapped_model(), [torch.tensor([3, 288])], check_spec())
