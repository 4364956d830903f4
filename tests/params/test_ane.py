"""The section of the FP16 check."""

from __future__ import annotations

from typing import Any

import pytest

from lib.params.ane import AneCheck
from tests.params.samples import check_refused

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"ane_check.modes": []}, ["ane_check.modes = []", "at least one"]),
    ({"ane_check.modes": ["bounded"]}, ['ane_check.modes = ["bounded"]', "must have wide"]),
    ({"ane_check.modes": ["wide", "wide"]}, ["ane_check.modes", "none twice"]),
    ({"ane_check.modes": ["wide", "narrow"]}, ["ane_check.modes", "'partial'"]),
    ({"ane_check.norm": "layer"}, ["ane_check.norm", "'plain'"]),
    ({"ane_check.remedy": "beta"}, ["ane_check.remedy", "'alpha'"]),
    ({"ane_check.partial_tokens": 1}, ["ane_check.partial_tokens = 1", "2"]),
    ({"ane_check.partial_inputs": 0}, ["ane_check.partial_inputs = 0", "1"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    check_refused(changes, words)


def test_order_of_the_modes_is_free() -> None:
    values = AneCheck.model_validate({"modes": ["partial", "wide"]})
    assert values.modes == ("partial", "wide")
