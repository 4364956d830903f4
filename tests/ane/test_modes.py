"""What each assumption about matrix products catches, and which of them fail the gate."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from lib.ane.check import run_check
from lib.ane.judge import Kind
from lib.ane.products import Mode
from tests.ane.tiny import check_spec, snapped_model, token_sequences

ALL = tuple(Mode)
LAX = {"max_kl": 1e9, "min_top1": 0.0}


def _with_large_logits() -> PreTrainedModel:
    """Logits that reach 40000: more than 32752, less than 65504."""
    model = snapped_model()
    with torch.no_grad():
        largest = max(float(model(ids[None]).logits.abs().max()) for ids in token_sequences())
        model.get_output_embeddings().weight.mul_(40000 / largest)
    return model


def test_every_mode_of_a_sound_model() -> None:
    spec = check_spec(modes=ALL, partial_tokens=16, partial_inputs=8)
    result = run_check(snapped_model(), token_sequences(), spec)
    assert result.passed, result.failures
    for modes in result.forms.values():
        assert list(modes) == list(ALL)
        assert modes[Mode.BOUNDED].same_as is Mode.WIDE  # no product passes the limit
        assert modes[Mode.BOUNDED].kl == modes[Mode.WIDE].kl
        assert modes[Mode.PARTIAL].tokens == 16
        assert modes[Mode.PARTIAL].kl > modes[Mode.WIDE].kl
        assert modes[Mode.PARTIAL].reference_perplexity != result.reference_perplexity


def test_a_product_above_the_bound_fails_mode_bounded_only() -> None:
    spec = check_spec(modes=(Mode.WIDE, Mode.BOUNDED), **LAX)
    result = run_check(_with_large_logits(), token_sequences(), spec)
    assert {(f.layer, f.mode, f.kind) for f in result.failures} == {
        ("lm_head", Mode.BOUNDED, Kind.OVERFLOW)
    }
    assert "above 32752" in result.failures[0].why
    modes = result.forms["baked"]
    assert modes[Mode.BOUNDED].same_as is None
    assert modes[Mode.BOUNDED].non_finite_logits > 0
    assert modes[Mode.WIDE].non_finite_logits == 0


def test_without_mode_bounded_it_is_a_warning() -> None:
    result = run_check(_with_large_logits(), token_sequences(), check_spec(**LAX))
    assert result.passed
    assert any("lm_head" in warning and "32752" in warning for warning in result.warnings)


def test_partial_sums_warn_and_do_not_fail() -> None:
    spec = check_spec(modes=(Mode.WIDE, Mode.PARTIAL), partial_inputs=4)
    loose = run_check(snapped_model(), token_sequences(), spec)
    assert not any("partial sums" in warning for warning in loose.warnings)
    kls = [(modes[Mode.WIDE].kl, modes[Mode.PARTIAL].kl) for modes in loose.forms.values()]
    wide, partial = max(kl for kl, _ in kls), min(kl for _, kl in kls)
    assert wide < partial
    between = check_spec(
        max_kl=math.sqrt(wide * partial), modes=(Mode.WIDE, Mode.PARTIAL), partial_inputs=4
    )
    strict = run_check(snapped_model(), token_sequences(), between)
    assert strict.passed, strict.failures
    assert sum("partial sums (24 tokens): KL" in warning for warning in strict.warnings) == 2


@pytest.mark.parametrize("mode", [Mode.BOUNDED, Mode.PARTIAL])
def test_an_overflow_is_told_once(mode: Mode) -> None:
    """What is infinite in mode wide is not another fault in a stricter mode."""
    model = snapped_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0**14)
    wide = run_check(model, token_sequences(), check_spec(**LAX)).failures
    both = run_check(model, token_sequences(), check_spec(modes=(Mode.WIDE, mode), **LAX))
    assert wide
    assert both.failures == wide
