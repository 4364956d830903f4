"""Descriptions of quantized layers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.base.errors import ParamsError
from lib.quant.spec import Codebook, LinearSpec, ScaleForm
from tests.tiny_models import linear_spec

SPECS = st.builds(
    LinearSpec,
    lut_size=st.sampled_from([2, 4, 8, 16, 32, 64, 128, 256]),
    rank=st.integers(1, 64),
    group_size=st.integers(1, 256),
    scale=st.sampled_from(ScaleForm),
    codebook=st.sampled_from(Codebook),
    range=st.floats(0.1, 1.0),
    ste_fp16=st.booleans(),
    refit_steps=st.integers(0, 9),
    feedback=st.booleans(),
    descent_steps=st.integers(0, 9),
)


@given(SPECS)
def test_json_round_trip(spec: LinearSpec) -> None:
    again = LinearSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert isinstance(again.scale, ScaleForm) and isinstance(again.codebook, Codebook)


@given(SPECS)
def test_bits_are_exact(spec: LinearSpec) -> None:
    assert 2**spec.bits == spec.lut_size


def test_equally_spaced_codebooks() -> None:
    assert [c for c in Codebook if c.is_affine] == [Codebook.UNIFORM, Codebook.BALANCED]


def test_a_rank_above_the_layers_is_refused_by_name() -> None:
    spec = linear_spec(lut_size=4, rank=9, group_size=8, scale=ScaleForm.LOWRANK)
    spec.check_shape(9, 100, "model.layers.0.mlp.up_proj")
    with pytest.raises(ParamsError, match=r"rank 9 .*layers\.3\.mlp\.up_proj .*at most 8"):
        spec.check_shape(8, 100, "model.layers.3.mlp.up_proj")


def test_the_rank_of_group_scales_is_the_number_of_groups() -> None:
    spec = linear_spec(rank=9, group_size=16, scale=ScaleForm.GROUP)
    assert [spec.rank_of(inputs) for inputs in (1, 16, 17, 48)] == [1, 1, 2, 3]
    spec.check_shape(2, 100, "up_proj")  # neither its rank nor its seven groups matter
    channel = linear_spec(rank=9, scale=ScaleForm.CHANNEL)
    assert channel.rank_of(48) == 1
    channel.check_shape(2, 100, "up_proj")
    assert linear_spec(rank=9).rank_of(48) == 9
