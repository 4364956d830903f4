"""A package's logits against the model's: equal ones pass, damage is a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.export.gate import LogitCheck, calls, check_logits, model_logits
from lib.export.graph import DeployedDecoder
from lib.export.package import Package
from tests.export.editing import damaged
from tests.export.models import IDS, SLOTS, TOKENS, package, snapped


def _check(path: Path, family: str = "qwen3", **changes: Any) -> LogitCheck:
    model = snapped(family)
    values: dict[str, Any] = {"tokens": TOKENS, "max_kl": 0.01, **changes}
    graph = DeployedDecoder(model, SLOTS)
    return check_logits(Package(path), graph, model_logits(model, IDS), IDS, **values)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_package_gives_the_models_logits(family: str) -> None:
    check = _check(package(family), family)
    assert check.faults == []
    assert check.tokens == len(IDS)
    assert check.from_graph < 1e-5 * check.largest
    assert check.from_model <= check.explained + 1e-5 * check.largest
    assert check.explained > 0


def test_ios16_too() -> None:
    assert _check(package("qwen3", "iOS16")).faults == []


@pytest.mark.parametrize("kind", ["indices", "lut"])
def test_damage_is_a_fault(kind: str, tmp_path: Path) -> None:
    def change(data: np.ndarray) -> None:
        data[:] = data[::-1].copy()

    check = _check(damaged(package(), tmp_path / "bad.mlpackage", kind, change))
    assert "from the graph that the package was made from" in check.faults[0]


def test_a_limit_on_the_kl_holds() -> None:
    check = _check(package(), max_kl=1e-12)
    assert len(check.faults) == 1 and "above export.max_kl 1e-12" in check.faults[0]


def test_calls_are_whole_prefills_then_single_tokens() -> None:
    assert calls(11, 8) == [(0, 8), (8, 1), (9, 1), (10, 1)]
    assert calls(4, 1) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert calls(16, 8) == [(0, 8), (8, 8)]
