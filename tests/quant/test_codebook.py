"""LUT values and nearest levels against one-line references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.base.errors import ParamsError
from lib.quant.codebook import (
    assign,
    cell_edges,
    distinct_fp16,
    fit_kmeans,
    make_codebook,
    project_learned,
    safe_ratio,
)
from lib.quant.spec import Codebook

SIZES = [2, 4, 8, 16, 32, 64, 128, 256]
FINITE = st.floats(-3, 3, width=32)


@pytest.mark.parametrize("size", SIZES)
def test_uniform_is_linspace_in_fp16(size: int) -> None:
    lut = make_codebook(Codebook.UNIFORM, size)
    assert torch.equal(lut, torch.linspace(-1, 1, size, dtype=torch.float64).half().float())
    for kind in (Codebook.KMEANS, Codebook.LEARNED):  # where these start
        assert torch.equal(make_codebook(kind, size), lut)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", list(Codebook))
def test_codebooks_are_sorted_symmetric_and_distinct_in_fp16(kind: Codebook, size: int) -> None:
    lut = make_codebook(kind, size)
    assert (lut.half().diff() > 0).all()
    assert torch.equal(lut, -lut.flip(0))
    assert torch.equal(lut, lut.half().float())


def test_published_levels() -> None:
    assert make_codebook(Codebook.BALANCED, 4).tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert make_codebook(Codebook.BALANCED, 16).tolist() == [i - 7.5 for i in range(16)]
    third = make_codebook(Codebook.UNIFORM, 4)[2].item()
    assert third == pytest.approx(1 / 3, abs=2**-12)
    assert third == torch.tensor(1 / 3).half().item()


@pytest.mark.parametrize("size", [0, 1, 3, 6, 24, 512])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ParamsError, match=f"lut_size {size} .* power of two from 2 to 256"):
        make_codebook(Codebook.UNIFORM, size)


def distances(ratio: Tensor, lut: Tensor) -> Tensor:
    """|ratio - level| for every level, float64 ``[N, n]``."""
    return (ratio.double()[:, None] - lut.double()[None, :]).abs()


@given(st.sampled_from(SIZES), st.sampled_from(list(Codebook)), st.lists(FINITE, min_size=1))
def test_assign_takes_the_nearest_level(size: int, kind: Codebook, values: list[float]) -> None:
    lut = make_codebook(kind, size)
    ratio = torch.tensor(values)
    index = assign(ratio.clone(), lut, affine=kind.is_affine)
    assert index.dtype == torch.uint8
    far = distances(ratio, lut)
    chosen = far.gather(1, index.long()[:, None]).squeeze(1)
    # The affine rule divides the line evenly, whereas FP16 moved each level a little.
    exact = torch.linspace(float(lut[0]), float(lut[-1]), size, dtype=torch.float64)
    rounding = 2 * float((lut.double() - exact).abs().max()) if kind.is_affine else 0.0
    assert (chosen <= far.amin(dim=1) + rounding + size * 2**-21).all()


@given(st.lists(FINITE, min_size=4, max_size=4, unique=True), st.lists(FINITE, min_size=1))
def test_assign_on_uneven_levels(levels: list[float], values: list[float]) -> None:
    lut, ratio = torch.tensor(sorted(levels)), torch.tensor(values)
    far = distances(ratio, lut)
    index = assign(ratio, lut, affine=False).long()
    assert (far.gather(1, index[:, None]).squeeze(1) <= far.amin(dim=1) + 2**-21).all()


@pytest.mark.parametrize("affine", [True, False])
def test_ties_go_down_and_infinities_to_the_ends(affine: bool) -> None:
    lut = make_codebook(Codebook.BALANCED, 4)
    ratio = torch.tensor([-1.0, 0.0, 1.0, float("inf"), float("-inf"), 1e30])
    assert assign(ratio, lut, affine=affine).tolist() == [0, 1, 2, 3, 0, 3]


@pytest.mark.parametrize("size", SIZES)
def test_cell_edges_are_where_assign_changes(size: int) -> None:
    for lut, affine in (
        (make_codebook(Codebook.UNIFORM, size), True),
        (torch.linspace(-1, 1, size).pow(3), False),
    ):
        edges = cell_edges(lut, affine=affine)
        shift = 1e-3 * (lut[1:] - lut[:-1])
        assert assign(edges - shift, lut, affine=affine).tolist() == list(range(size - 1))
        assert assign(edges + shift, lut, affine=affine).tolist() == list(range(1, size))


def test_safe_ratio_of_zero_scales() -> None:
    weight = torch.tensor([0.0, 1.0, -1.0, 3.0])
    scale = torch.tensor([0.0, 0.0, 0.0, -2.0])
    assert safe_ratio(weight, scale).tolist() == [0.0, float("inf"), float("-inf"), -1.5]


def kmeans_cost(values: Tensor, lut: Tensor, mass: Tensor | None = None) -> float:
    weight = torch.ones_like(values) if mass is None else mass
    return float((distances(values, lut).amin(dim=1).square() * weight).sum() / weight.sum())


def slow_kmeans(values: Tensor, start: Tensor) -> Tensor:
    lut = start.double().clone()
    for _ in range(200):
        index = distances(values, lut).argmin(dim=1)
        lut = torch.stack([values.double()[index == i].mean() for i in range(len(lut))])
    return lut


@pytest.mark.parametrize("size", [4, 16])
def test_kmeans_costs_what_plain_lloyd_costs(size: int) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    start = values.quantile((torch.arange(size) + 0.5) / size)
    fitted = kmeans_cost(values, fit_kmeans(values, size, steps=200))
    assert fitted <= 1.05 * kmeans_cost(values, slow_kmeans(values, start))
    assert fitted < 0.75 * kmeans_cost(values, make_codebook(Codebook.UNIFORM, size))


def test_kmeans_finds_separate_clusters_and_counts_weights() -> None:
    centers = torch.tensor([-2.0, -0.5, 0.25, 3.0])
    values = centers.repeat(100)
    assert torch.allclose(fit_kmeans(values, 4), centers, atol=2**-9)
    pair = torch.tensor([-1.0, 0.0, 1.0])
    assert fit_kmeans(pair, 2, torch.tensor([1.0, 3.0, 0.0])).tolist() == [-1.0, 0.0]
    low, high = fit_kmeans(pair, 2, torch.tensor([1.0, 1.0, 1e-3])).tolist()
    assert (low, high) == (-1.0, pytest.approx(1e-3, rel=1e-2))


def test_kmeans_of_a_uniform_lut_halves_it_in_pairs_of_equal_cost() -> None:
    lut = fit_kmeans(make_codebook(Codebook.UNIFORM, 16), 4)
    assert torch.allclose(lut, torch.tensor([-0.8, -4 / 15, 4 / 15, 0.8]), atol=1e-3)


def test_kmeans_does_not_spend_its_bins_on_outliers() -> None:
    values = torch.randn(50000, generator=torch.Generator().manual_seed(0))
    clean = fit_kmeans(values, 4)
    mass = torch.ones_like(values)
    mass[:2] = 0.0
    values[:2] = torch.tensor([1e9, float("inf")])  # where S crosses zero; it weighs nothing
    assert torch.allclose(fit_kmeans(values, 4, mass), clean, atol=0.01)
    values[1] = -3e8
    assert torch.allclose(fit_kmeans(values, 4), clean, atol=0.01)


def test_kmeans_of_few_values_stays_distinct() -> None:
    lut = fit_kmeans(torch.tensor([0.5, 0.5, 0.5]), 8)
    assert (lut.half().diff() > 0).all()
    assert lut[0] == 0.5


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=16))
def test_distinct_fp16(values: list[float]) -> None:
    lut = torch.tensor(values)
    result = distinct_fp16(lut)
    assert (result.half().diff() > 0).all()
    assert torch.equal(result, result.half().float())
    rounded = lut.sort().values.half()
    if (rounded.diff() > 0).all():
        assert torch.equal(result, rounded.float())


@given(st.lists(FINITE, min_size=1, max_size=8), st.lists(FINITE, min_size=1, max_size=8))
def test_project_learned_is_admissible(left: list[float], right: list[float]) -> None:
    size = min(len(left), len(right))
    lut = project_learned(torch.tensor(left[:size] + right[:size]))
    assert torch.equal(lut, -lut.flip(0))
    assert (lut.half().diff() > 0).all()
    assert torch.allclose(project_learned(lut), lut, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [Codebook.UNIFORM, Codebook.BALANCED])
def test_project_learned_leaves_admissible_ones_alone(kind: Codebook, size: int) -> None:
    lut = make_codebook(kind, size)
    assert torch.equal(project_learned(lut), lut)


def test_project_learned_is_the_mean_of_mirrored_levels() -> None:
    lut = torch.tensor([0.2, -0.9, 1.1, -0.4])
    assert torch.allclose(project_learned(lut), torch.tensor([-1.0, -0.3, 0.3, 1.0]))
