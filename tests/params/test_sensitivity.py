"""The section of the stage sensitivity."""

from __future__ import annotations

from typing import Any

import pytest

from lib.params.load import parse_params
from tests.params.samples import check_refused, with_values

FILE = {"sensitivity.method": "file"}
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"sensitivity.method": "none"}, ['sensitivity.method = "none"', "'fisher'", "'perturbation'"]),
    (FILE, ["sensitivity.file = null", "set it, or sensitivity.method to fisher"]),
    ({**FILE, "sensitivity.file": ""}, ["sensitivity.file", "needs the path of a JSON file"]),
    ({"sensitivity.file": "a.json"}, ["sensitivity.file = a.json", "is fisher", "to null or"]),
    (
        {"sensitivity.method": "perturbation", "sensitivity.file": "a.json"},
        ["sensitivity.file = a.json", "is perturbation"],
    ),
    ({**FILE, "sensitivity.file": 3}, ["sensitivity.file = 3", "string"]),
    ({"sensitivity.batches": 0}, ["sensitivity.batches = 0", "1"]),
    ({"sensitivity.batch_size": 0}, ["sensitivity.batch_size = 0", "1"]),
    ({"sensitivity.beta": 1.0}, ["sensitivity.beta = 1.0", "less than 1"]),
    ({"sensitivity.beta": -0.1}, ["sensitivity.beta = -0.1", "0"]),
    ({"sensitivity.sequences": 0}, ["sensitivity.sequences = 0", "1"]),
    ({"sensitivity.seed": -1}, ["sensitivity.seed = -1", "0"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    check_refused(changes, words)


@pytest.mark.parametrize(
    "changes",
    [
        {**FILE, "sensitivity.file": "data/local/scores.json"},
        {"sensitivity.method": "perturbation", "sensitivity.sequences": 1},
        {"sensitivity.beta": 0, "sensitivity.batches": 1},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    parse_params(with_values(changes))


def test_documented_defaults() -> None:
    section = parse_params(with_values({})).sensitivity
    assert (section.method, section.file, section.beta) == ("fisher", None, 0.95)
    assert (section.batches, section.batch_size, section.sequences) == (4, 4, 12)
