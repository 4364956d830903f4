"""The section of the proximal regularizer, and what it does not go together with."""

from __future__ import annotations

from typing import Any

import pytest

from lib.params.load import parse_params
from tests.params.samples import check_refused, with_values

ON = {"weights.regularizer": "prox"}
EXPONENTIAL = {"prox.schedule": "exponential"}
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"weights.regularizer": "l2"}, ['weights.regularizer = "l2"', "'prox'"]),
    ({"scales.regularizer": "none"}, ["scales.regularizer is not a known key"]),
    ({"prox.select": "head"}, ['prox.select = "head"', "'attention'"]),
    ({"prox.control": "pid"}, ['prox.control = "pid"', "'dual'"]),
    ({"prox.schedule": "step"}, ['prox.schedule = "step"', "'cosine'"]),
    ({"prox.gamma_end": -1}, ["prox.gamma_end = -1"]),
    (EXPONENTIAL, ["prox.gamma_start = 0.0", "cannot pass 0", "set both above 0"]),
    ({"prox.beta": 0}, ["prox.beta = 0", "greater than 0"]),
    ({"prox.k_i": 0}, ["prox.k_i = 0", "greater than 0"]),
    ({"prox.k_p": -1}, ["prox.k_p = -1"]),
    ({"prox.lambda_max": 0}, ["prox.lambda_max = 0"]),
    ({"prox.fisher_beta": 1.0}, ["prox.fisher_beta = 1.0", "less than 1"]),
    ({"prox.atol": 0}, ["prox.atol = 0", "greater than 0"]),
    ({"prox.hard": "soft"}, ['prox.hard = "soft"', "'selective'"]),
    ({**ON, "weights.method": "layerwise"}, ["weights.method = layerwise", "set it to e2e"]),
    ({**ON, "weights.method": "blockwise"}, ["weights.method = blockwise", "set it to e2e"]),
    (
        {**ON, "weights.rates": {"weight": 1e-5, "scale_direction": 1e-4}},
        ["weights.rates.scale_direction = 0.0001", "set it to 0", "regularizer to none"],
    ),
    (
        {**ON, "quant.codebook": "learned", "weights.rates": {"lut": 1e-3}},
        ["weights.rates.lut = 0.001", "set it to 0"],
    ),
    (
        {**ON, "prox.select": "attention", "weights.train_mlp_only": True},
        ["prox.select = attention", "does not train", "all_linear"],
    ),
    (
        {**ON, "prox.select": "attention", "quant.attention": False, "convert.attention_rank": 0}
        | {"convert.attention_lut_size": 0},
        ["prox.select = attention", "is not quantized"],
    ),
    ({**ON, "run.shard": True}, ["run.shard = true", "whole layers", "set it to false"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    check_refused(changes, words)


@pytest.mark.parametrize(
    "changes",
    [
        {**ON, "prox.control": "dual", "prox.fisher": True, "prox.hard": "selective"},
        {**ON, **EXPONENTIAL, "prox.gamma_start": 1e-3, "prox.gamma_end": 0.1},
        {**ON, "run.processes": 2},
        {**EXPONENTIAL, "prox.control": "dual"},
        {"prox.select": "attention", "weights.train_mlp_only": True},  # it is off
    ],
    ids=str,
)
def test_accepted(changes: dict[str, Any]) -> None:
    parse_params(with_values(changes))


def test_documented_defaults() -> None:
    params = parse_params(with_values({}))
    assert params.weights.regularizer == "none"
    prox = params.prox
    assert (prox.select, prox.control, prox.schedule) == ("all_linear", "gamma", "linear")
    assert (prox.fisher, prox.fisher_beta, prox.hard) == (False, 0.95, "full")
