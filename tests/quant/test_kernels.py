"""Compiled kernels against the same functions as they stand: equal bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.base import compiled
from lib.quant import kernels
from lib.quant.codebook import make_codebook
from lib.quant.kernels import (
    is_computable,
    level_sums,
    pull_to_grid,
    quantized,
    scaled_levels,
)
from lib.quant.spec import Codebook

OUT, IN = 264, 256  # just enough entries to be compiled


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that ran compiled."""
    calls: list[str] = []
    original = compiled._compiled

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        calls.append(function.__name__)
        return original(function)

    monkeypatch.setattr(compiled, "_compiled", watched)
    return calls


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    scale = torch.randn(OUT, IN, generator=generator)
    scale[3] = 0.0
    weight[3, :7] = 0.0  # 0 / 0 beside x / 0
    scale[5] = weight[5]  # ratios exactly on a level
    scale[6] = 3 * weight[6]
    scale[7] = 1.5 * weight[7]  # and on the edge between two of 4 equally spaced ones
    return weight, scale


@pytest.mark.parametrize("size", [2, 4, 16, 32])
@pytest.mark.parametrize("affine", [True, False])
def test_compiled_equals_plain(size: int, affine: bool, compiled_calls: list[str]) -> None:
    weight, scale = operands()
    lut = make_codebook(Codebook.UNIFORM, size)
    w_q, indices = quantized(weight, scale, lut, affine=affine)
    plain_w, plain_indices = kernels._quantized(weight, scale, lut, affine)
    assert torch.equal(indices, plain_indices)
    assert torch.equal(w_q, plain_w)
    assert torch.equal(scaled_levels(scale, indices, lut, affine=affine), w_q)
    assert torch.equal(w_q, scale * lut[indices.long()])
    assert compiled_calls == ["_quantized", "_scaled_levels"]
    assert w_q.isfinite().all() and int(indices.max()) == size - 1


@pytest.mark.parametrize("codebook", [Codebook.UNIFORM, Codebook.BALANCED])
def test_affine_codebooks_are_computable_to_the_bit(codebook: Codebook) -> None:
    for bits in range(1, 9):
        lut = make_codebook(codebook, 2**bits)
        assert is_computable(lut)
        moved = lut.clone()
        moved[0] = torch.nextafter(moved[0].half(), torch.tensor(0.0).half()).float()
        assert not is_computable(moved)


@pytest.mark.parametrize("affine", [True, False])
def test_level_moments(affine: bool, compiled_calls: list[str]) -> None:
    weight, scale = operands()
    lut, used = make_codebook(Codebook.UNIFORM, 4), torch.linspace(0, 2, IN)
    squares, products = kernels.level_moments(weight, scale, lut, used, affine=affine)
    _, indices = kernels._quantized(weight, scale, lut, affine)
    level = lut[indices.long()]
    assert compiled_calls == ["_level_moments"]
    torch.testing.assert_close(squares, used * level**2)
    torch.testing.assert_close(products, used * level * weight)


@pytest.mark.parametrize("affine", [True, False])
def test_pull_to_grid_compiled_equals_plain(affine: bool, compiled_calls: list[str]) -> None:
    weight, scale = operands()
    lut, share = make_codebook(Codebook.UNIFORM, 4), torch.tensor(0.3)
    moved, plain = weight.clone(), weight.clone()
    rows = pull_to_grid(moved, scale, lut, share, affine=affine)
    plain_rows = kernels._pulled(plain, scale, lut, share, affine)
    assert compiled_calls == ["_pulled"]
    assert not torch.equal(moved, weight)
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rows, plain_rows, rtol=1e-5, atol=1e-6)
    w_q, _ = kernels._quantized(weight, scale, lut, affine)
    torch.testing.assert_close(moved, weight + 0.3 * (w_q - weight))


def test_level_sums_against_float64(compiled_calls: list[str]) -> None:
    values, _ = operands()
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(0, 8, (OUT, IN), dtype=torch.uint8, generator=generator)
    exact = [float(values[indices == k].double().sum()) for k in range(8)]
    sums = level_sums(values, indices, 8)
    assert compiled_calls == ["_row_sums"]
    assert torch.allclose(sums.double(), torch.tensor(exact, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(sums, kernels._row_sums(values, indices, 8).sum(dim=1), atol=1e-4)


def test_small_layers_are_not_compiled(compiled_calls: list[str]) -> None:
    lut = make_codebook(Codebook.UNIFORM, 4)
    values = torch.ones(8, 8)
    scaled_levels(values, torch.zeros(8, 8, dtype=torch.uint8), lut)
    assert compiled_calls == []
