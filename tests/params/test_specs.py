"""From sections to descriptions: what each start asks for."""

from __future__ import annotations

from typing import Any

import pytest

from lib.params.specs import model_spec, moments_needed, target_spec
from lib.params.training import Convert, Init, Quant

STARTS = [
    # init, refits, error feedback, search of the range
    ("maxabs", 0, False, False),
    ("range", 0, False, True),
    ("importance", 3, False, False),
    ("gptq", 0, True, False),
    ("importance+gptq", 3, True, False),
    ("range+importance", 3, False, True),
    ("range+gptq", 0, True, True),
    ("range+importance+gptq", 3, True, True),
]


@pytest.mark.parametrize(("init", "refits", "feedback", "search"), STARTS)
def test_starts(init: Any, refits: int, feedback: bool, search: bool) -> None:
    quant = Quant(init=init, refit_steps=3, descent_steps=5, attention_lut_size=8)
    convert = Convert(init=init, refit_steps=3, descent_steps=5)
    for spec in (model_spec(quant), target_spec(convert, ste_fp16=True)):
        assert spec.attention is not None
        assert {spec.mlp.refit_steps, spec.attention.refit_steps} == {refits}
        assert spec.mlp.feedback is spec.attention.feedback is feedback
        rounds = 5 if feedback else 0
        assert {spec.mlp.descent_steps, spec.attention.descent_steps} == {rounds}
        assert spec.mlp.search_range is spec.attention.search_range is search
        assert spec.needs is spec.mlp.needs is moments_needed(init)


@pytest.mark.parametrize(
    ("inits", "needed"),
    [
        (("maxabs", "maxabs"), "none"),
        (("maxabs", "importance"), "squares"),
        (("importance", "importance"), "squares"),
        (("gptq", "maxabs"), "products"),
        (("importance", "importance+gptq"), "products"),
        (("range", "importance"), "products"),
    ],
)
def test_what_starts_need_to_know_of_the_inputs(inits: tuple[Init, Init], needed: str) -> None:
    assert moments_needed(*inits) == needed


def test_attention_takes_its_own_sizes_or_those_of_the_mlps() -> None:
    spec = model_spec(Quant(lut_size=16, rank=4, attention_lut_size=8))
    assert spec.attention is not None
    assert (spec.attention.lut_size, spec.attention.rank) == (8, 4)
    assert model_spec(Quant(attention=False)).attention is None
