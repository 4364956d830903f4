"""A package's logits against the model's: equal ones pass, damage is a fault."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.export import layers
from lib.export.audit import audit_package
from lib.export.gate import (
    LogitCheck,
    calls,
    check_package,
    compare,
    fp16_constants,
    model_logits,
)
from lib.export.graph import DeployedDecoder
from lib.export.package import Package
from lib.model.rescale import scale_residual
from tests.export.editing import damaged
from tests.export.models import IDS, KINDS, SLOTS, TOKENS, graph_logits, package, snapped
from tests.tiny_models import same, state_of


def _check(path: Path, family: str = "qwen3", max_kl: float = 0.01, **changes: Any) -> LogitCheck:
    model = snapped(family, **changes)
    expected = model_logits(model, IDS)
    graph = DeployedDecoder(model, SLOTS)
    return check_package(Package(path), graph, model, expected, IDS, tokens=TOKENS, max_kl=max_kl)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_package_gives_the_models_logits(family: str) -> None:
    check = _check(package(family), family)
    assert check.faults == []
    assert check.tokens == len(IDS)
    assert check.explained is not None and check.unexplained is not None
    assert check.unexplained < 1e-5 * check.largest < check.explained
    assert check.from_model <= check.explained + check.unexplained


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_other_kinds_of_model_too(changes: dict[str, Any]) -> None:
    assert _check(package("llama", **changes), "llama", **changes).faults == []


def test_a_head_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "HEAD_SLICE", 40)  # 97 tokens: 40, 40, 17
    assert len(DeployedDecoder(snapped(), SLOTS).head) == 3
    path = package(head=3)
    assert _check(path).faults == []
    assert audit_package(Package(path), DeployedDecoder(snapped(), SLOTS)).faults == []


def test_ios16_too() -> None:
    assert _check(package("qwen3", "iOS16")).faults == []


@pytest.mark.parametrize("kind", ["indices", "lut"])
def test_damage_is_a_fault(kind: str, tmp_path: Path) -> None:
    def change(data: np.ndarray) -> None:
        data[:] = data[::-1].copy()

    check = _check(damaged(package(), tmp_path / "bad.mlpackage", kind, change))
    assert any("from the snapped model's on FP16 constants" in fault for fault in check.faults)


def test_a_limit_on_the_kl_holds() -> None:
    check = _check(package(), max_kl=1e-12)
    assert len(check.faults) == 1 and "above export.max_kl 1e-12" in check.faults[0]


def test_not_a_number_is_a_fault() -> None:
    expected = torch.randn(3, 5)
    found = expected.clone()
    found[1, 2] = math.nan
    assert compare(found, expected, max_kl=10.0, name="x").faults
    assert not compare(expected.clone(), expected, max_kl=1e-6, name="x").faults


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fp16_constants_are_the_graphs_and_only_for_a_while(family: str) -> None:
    model = snapped(family)
    before = state_of(model)
    plain = model_logits(model, IDS)
    with fp16_constants(model):
        rounded = model_logits(model, IDS)
    assert torch.equal(model_logits(model, IDS), plain) and same(before, state_of(model))
    graph = graph_logits(DeployedDecoder(model, SLOTS), IDS, TOKENS)
    assert (graph - rounded).abs().max() < 1e-5 * plain.abs().max()
    assert (graph - plain).abs().max() > 1e-4 * plain.abs().max()


def test_a_rescaled_model_is_compared_with_the_one_before() -> None:
    model = snapped()
    scale_residual(model, 0.25)
    graph = DeployedDecoder(model, SLOTS)
    found = graph_logits(graph, IDS, TOKENS)
    assert not compare(found, model_logits(snapped(), IDS), max_kl=1e-4, name="x").faults


def test_calls_are_whole_prefills_then_single_tokens() -> None:
    assert calls(11, 8) == [(0, 8), (8, 1), (9, 1), (10, 1)]
    assert calls(4, 1) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert calls(16, 8) == [(0, 8), (8, 8)]
