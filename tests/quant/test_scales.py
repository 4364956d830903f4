"""Scale factors against the slow way: an SVD of the expanded matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.quant.scales import (
    MIN_MAXABS,
    expand_groups,
    group_maxabs,
    group_members,
    initial_factors,
    initial_scale,
    lowrank_from_groups,
    refine_group,
    to_directional,
    unit_columns,
    unit_rows,
)
from lib.quant.spec import ScaleForm
from tests.tiny_models import linear_spec


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 4096), st.integers(1, 512), st.integers(1, 64))
def test_refined_groups_suffice_for_the_rank(inputs: int, group_size: int, rank: int) -> None:
    rank = min(rank, inputs)
    group = refine_group(inputs, group_size, rank)
    assert 1 <= group <= group_size
    assert -(-inputs // group) >= rank
    wider = min(group_size, inputs)
    while wider > group:  # nothing coarser on the way would have done
        assert -(-inputs // wider) < rank
        wider //= 2
    assert wider == group


def test_refined_group_of_the_default_model() -> None:
    assert refine_group(576, 32, 4) == 32
    assert refine_group(576, 32, 32) == 16


@pytest.mark.parametrize(("inputs", "group"), [(12, 4), (13, 4), (3, 8), (5, 1)])
def test_group_maxabs(inputs: int, group: int) -> None:
    weight = randn(6, inputs)
    weight[2] = 0.0
    found = group_maxabs(weight, group)
    for j, start in enumerate(range(0, inputs, group)):
        slow = weight[:, start : start + group].abs().amax(dim=1).clamp_min(MIN_MAXABS)
        assert torch.equal(found[:, j], slow)
    expanded = expand_groups(found, group, inputs)
    assert expanded.shape == weight.shape
    assert (expanded >= weight.abs()).all()


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**20))
def test_members_repeat_each_scale_over_its_group_exactly(
    inputs: int, group: int, seed: int
) -> None:
    members = group_members(inputs, group)
    s = randn(5, -(-inputs // group), seed=seed)
    slow = s.repeat_interleave(group, dim=1)[:, :inputs]
    assert torch.equal(s @ members, slow)
    assert (members.sum(dim=0) == 1).all()


@pytest.mark.parametrize(("inputs", "group"), [(12, 4), (13, 4), (3, 8)])
def test_group_scales_start_at_a_share_of_the_maxabs(inputs: int, group: int) -> None:
    weight = randn(6, inputs)
    weight[2] = 0.0
    spec = linear_spec(scale=ScaleForm.GROUP, group_size=group, rank=99, range=0.65)
    s, members = initial_factors(weight, spec, lut_max=7.5)
    for j in range(inputs):
        start = j // group * group
        slow = weight[:, start : start + group].abs().amax(dim=1).clamp_min(MIN_MAXABS)
        assert torch.allclose((s @ members)[:, j], 0.65 / 7.5 * slow)


@pytest.mark.parametrize("inputs", [1, 12])
def test_channel_scales_start_at_the_rows_maxabs_and_the_range(inputs: int) -> None:
    weight = randn(6, inputs)
    weight[2] = 0.0
    spec = linear_spec(scale=ScaleForm.CHANNEL, group_size=4, rank=99, range=0.65)
    s, b = initial_factors(weight, spec, lut_max=7.5)
    slow = [max(max(map(abs, row)), MIN_MAXABS) / 7.5 for row in weight.tolist()]
    assert s.shape == (6, 1) and s[:, 0].tolist() == pytest.approx(slow)
    assert torch.equal(b, torch.full((1, inputs), 0.65))


def test_other_forms_start_from_an_svd() -> None:
    weight, spec = randn(24, 40), linear_spec(rank=3, group_size=8, range=0.65)
    wanted = initial_scale(weight, group_size=8, rank=3, range_share=0.65, lut_max=2.0)
    found = initial_factors(weight, spec, lut_max=2.0)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("inputs", "group", "rank"), [(48, 8, 4), (45, 8, 3), (45, 8, 6), (16, 16, 1)]
)
def test_small_svd_is_the_svd_of_the_expanded_matrix(inputs: int, group: int, rank: int) -> None:
    maxima = group_maxabs(randn(20, inputs), group)
    a, b = lowrank_from_groups(maxima, group, inputs, rank)
    u, s, vh = torch.linalg.svd(expand_groups(maxima, group, inputs).double(), full_matrices=False)
    slow = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert torch.allclose((a @ b).double(), slow, atol=1e-5)
    assert torch.allclose(a.norm(dim=0), b.norm(dim=1), rtol=1e-4)  # split evenly
    assert (a.sum(dim=0) >= 0).all()
    if rank == maxima.shape[1]:
        assert torch.allclose(a @ b, expand_groups(maxima, group, inputs), atol=1e-5)


def test_initial_scale_is_a_share_of_the_maxabs() -> None:
    weight = randn(24, 40)
    scale = torch.matmul(
        *initial_scale(weight, group_size=40, rank=1, range_share=0.65, lut_max=7.5)
    )
    slow = 0.65 / 7.5 * weight.abs().amax(dim=1, keepdim=True).expand(24, 40)
    assert torch.allclose(scale, slow, rtol=1e-5)


def test_every_rank_of_a_high_rank_scale_carries_signal() -> None:
    a, _ = initial_scale(randn(64, 72), group_size=32, rank=16, range_share=1.0, lut_max=1.0)
    assert a.norm(dim=0).min() > 0.1  # 72 / 32 groups alone would leave 13 of 16 ranks empty
    with pytest.raises(ValueError, match="rank 9"):
        initial_scale(randn(8, 16), group_size=4, rank=9, range_share=1.0, lut_max=1.0)


@given(st.integers(0, 2**31), st.floats(-2, 2), st.floats(-2, 2))
def test_change_of_form_is_exact(seed: int, log_a: float, log_b: float) -> None:
    a, b = randn(9, 3, seed=seed) * 10**log_a, randn(3, 7, seed=seed + 1) * 10**log_b
    a_dir, b_dir, g = to_directional(a, b)
    ones = torch.ones(3)
    assert torch.allclose(a_dir.norm(dim=0), ones) and torch.allclose(b_dir.norm(dim=1), ones)
    before, after = a.double() @ b.double(), (a_dir * g).double() @ b_dir.double()
    # Every factor was rounded about three times more than in A @ B: a few float32 epsilons.
    assert (after - before).abs().max() <= 2**-21 * (a.abs() @ b.abs()).max()


def test_unit_directions_survive_a_zero_rank() -> None:
    a = randn(6, 3)
    a[:, 1] = 0.0
    assert torch.allclose(unit_columns(a).norm(dim=0), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.allclose(unit_rows(a.T), unit_columns(a).T)
    a_dir, b_dir, g = to_directional(a, randn(3, 5))
    assert g[1] == 0
    assert ((a_dir * g) @ b_dir).isfinite().all()
