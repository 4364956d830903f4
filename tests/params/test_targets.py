"""Rules around `cache.targets`."""

from __future__ import annotations

from typing import Any

import pytest

from lib.params.load import parse_params
from tests.params.samples import check_refused, with_values

SAMPLED = {
    "cache.targets": "sampled",
    "weights.hard_top1_weight": 0,
    "finetune_q2.hard_top1_weight": 0,
}

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"cache.targets": "random"}, ["cache.targets", "random", "topk", "sampled"]),
    ({"cache.samples": 7}, ["cache.samples = 7", "8"]),
    ({"cache.samples": 1025}, ["cache.samples = 1025", "1024"]),
    ({"cache.sample_temperature": 0}, ["cache.sample_temperature = 0", "greater than 0"]),
    ({"cache.sample_power": 0}, ["cache.sample_power = 0", "greater than 0"]),
    ({"cache.sample_power": 1.1}, ["cache.sample_power = 1.1", "1"]),
    (
        {**SAMPLED, "cache.codec": "packed"},
        ["cache.codec = packed", "cache.targets is sampled", "set it to raw"],
    ),
    (
        {**SAMPLED, "distill.temperature": 1.0},
        ["cache.sample_temperature = 2.0", "distill.temperature is 1.0", "set both"],
    ),
    (
        {**SAMPLED, "weights.hard_top1_weight": 0.1},
        ["weights.hard_top1_weight = 0.1", "no candidates", "hard_full_weight", "cache.targets"],
    ),
    (
        {**SAMPLED, "recover.steps": 5, "recover.hard_top1_weight": 0.1},
        ["recover.hard_top1_weight = 0.1", "cache.targets"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    assert "params.yaml" in check_refused(changes, words)


@pytest.mark.parametrize(
    "changes",
    [
        SAMPLED,
        {**SAMPLED, "cache.sample_temperature": 1.5, "distill.temperature": 1.5},
        {**SAMPLED, "distill.target": "tail", "cache.sample_power": 0.5, "cache.samples": 1024},
        {**SAMPLED, "weights.hard_top1_weight": 0.1, "weights.steps": 0},
        {**SAMPLED, "scales.method": "layerwise", "weights.method": "blockwise"},
        {**SAMPLED, "distill.source": "teacher"},
        {"cache.sample_temperature": 5.0, "cache.codec": "packed"},  # of no use to the top k
    ],
    ids=lambda value: str(value)[:60],
)
def test_accepted(changes: dict[str, Any]) -> None:
    parse_params(with_values(changes))
