"""Section `recover`: what is refused, and the documented defaults."""

from __future__ import annotations

from typing import Any

import pytest

from lib.params.load import parse_params
from tests.params.samples import SMALLEST, check_refused, with_values

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"recover.mode": "dpo"}, ['recover.mode = "dpo"', "'kd_cache'", "'sft'"]),
    ({"recover.rank": 0}, ["recover.rank = 0", "1"]),
    ({"recover.alpha": 0.0}, ["recover.alpha = 0.0", "greater than 0"]),
    ({"recover.dropout": 1.0}, ["recover.dropout = 1.0", "less than 1"]),
    ({"recover.rate": 0.0}, ["recover.rate = 0.0", "greater than 0"]),
    ({"recover.warmup_steps": 5}, ["recover.warmup_steps = 5", "steps = 0"]),
    ({"recover.rates": {}}, ["recover.rates", "did you mean recover.rate?"]),
    (
        {"recover.steps": 3, "snap.form": "baked"},
        ["recover.steps = 3", "snap.form is baked", "snap.form to lut"],
    ),
    *(
        (
            {"recover.mode": mode, "recover.hard_top1_weight": 0.1},
            ["recover.hard_top1_weight = 0.1", f"recover.mode is {mode}", "kd_cache"],
        )
        for mode in ("kd", "sft", "text")
    ),
    *(
        (
            {"recover.mode": mode, "recover.hard_full_weight": 0.1},
            ["recover.hard_full_weight = 0.1", f"recover.mode {mode} asks no teacher", "kd"],
        )
        for mode in ("sft", "text")
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=str)
def test_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    check_refused(changes, words)


@pytest.mark.parametrize(
    "changes",
    [
        {"recover.mode": "kd", "recover.hard_full_weight": 0.1},
        {"recover.hard_top1_weight": 0.1, "recover.hard_full_weight": 0.1},
        {"recover.mode": "sft", "recover.alpha": 16},
        {"snap.form": "baked"},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    parse_params(with_values(changes))


def test_documented_defaults() -> None:
    recover = parse_params(SMALLEST).recover
    assert recover.steps == 0 and recover.mode == "kd_cache"
    assert (recover.rank, recover.alpha, recover.dropout) == (8, 8.0, 0.0)
    assert recover.skip_k and not recover.mlp_only
    assert recover.rate == recover.rate_of("adapter") == 2e-4


def test_nothing_but_adapters_trains() -> None:
    params = parse_params(SMALLEST)
    roles = ("weight", "scale_direction", "scale_magnitude", "lut", "frozen")
    assert [params.recover.rate_of(role) for role in roles] == [0.0] * 5
    assert params.scales.rate_of("scale_direction") == 1e-3
    assert params.scales.rate_of("adapter") == 0.0
