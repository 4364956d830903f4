"""The refit lowers the weighted error, half step by half step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lib.quant.codebook import assign, make_codebook, safe_ratio
from lib.quant.refit import (
    _solve_groups,
    _solve_rows,
    balance,
    fit_codebook,
    refit,
    refit_channels,
    refit_factors,
    refit_groups,
    solve_channels,
    solve_clip,
    weighted_error,
)
from lib.quant.scales import initial_factors, initial_scale
from lib.quant.spec import Codebook, ScaleForm
from lib.quant.ste import lookup
from tests.tiny_models import linear_spec

GROUPS = [8, 7, 64]  # that divide the 40 inputs, or not, or are one
OUT, IN, RANK = 24, 40, 4


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, A, B, h."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) * torch.rand(
        OUT, 1, generator=generator
    ).add(0.1)
    used = torch.rand(IN, generator=generator).pow(4) * 10
    a, b = initial_scale(weight, group_size=8, rank=RANK, range_share=1.0, lut_max=1.0)
    return weight, a, b, used


def group_problem(group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, s, E, h."""
    weight, _, _, used = problem(seed)
    spec = linear_spec(scale=ScaleForm.GROUP, group_size=group)
    return weight, *initial_factors(weight, spec, 1.0), used


def quantized(weight: Tensor, a: Tensor, b: Tensor, lut: Tensor) -> Tensor:
    scale = a @ b
    return lookup(lut, assign(safe_ratio(weight, scale), lut, affine=True)) * scale


def slow_error(weight: Tensor, approximation: Tensor, used: Tensor) -> float:
    """sum_ij h_j (W - W_q)_ij^2 as a loop."""
    total = 0.0
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            total += float(used[j]) * float(weight[i, j] - approximation[i, j]) ** 2
    return total


def test_weighted_error_is_the_equation() -> None:
    weight, a, b, used = problem()
    approximation = a @ b
    share = slow_error(weight, approximation, used) / slow_error(
        weight, torch.zeros_like(weight), used
    )
    assert weighted_error(weight, approximation, used) == pytest.approx(share, rel=1e-4)


def test_solve_rows_is_damped_least_squares() -> None:
    weight, a, b, used = problem()
    levels = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    solved = _solve_rows(levels**2 * used, weight * levels * used, b, a)
    for i in range(OUT):
        design = (levels[i] * b).T  # [in, r]
        gram = design.T @ (used[:, None] * design)
        damping = 1e-3 * gram.diagonal().mean() + 1e-12
        right = design.T @ (used * weight[i]) + damping * a[i]
        slow = torch.linalg.solve(gram + damping * torch.eye(RANK), right)
        assert torch.allclose(solved[i], slow, atol=1e-4)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_no_half_step_raises_the_error(size: int, seed: int) -> None:
    weight, a, b, used = problem(seed)
    lut = make_codebook(Codebook.UNIFORM, size)
    errors = [slow_error(weight, quantized(weight, a, b, lut), used)]
    for _ in range(4):
        levels = lookup(lut, assign(safe_ratio(weight, a @ b), lut, affine=True))
        a = _solve_rows(levels**2 * used, weight * levels * used, b, a)
        errors.append(slow_error(weight, levels * (a @ b), used))
        errors.append(slow_error(weight, quantized(weight, a, b, lut), used))
        levels = lookup(lut, assign(safe_ratio(weight, a @ b), lut, affine=True))
        b = _solve_rows(levels.T**2, (weight * levels).T, a.T, b.T).T.contiguous()
        errors.append(slow_error(weight, levels * (a @ b), used))
        errors.append(slow_error(weight, quantized(weight, a, b, lut), used))
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("group", GROUPS)
def test_solve_groups_is_solve_rows_of_their_members(group: int) -> None:
    weight, s, members, used = group_problem(group)
    levels = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    moments = levels**2 * used, weight * levels * used
    found = _solve_groups(*moments, members, s)
    assert torch.allclose(found, _solve_rows(*moments, members, s), rtol=1e-4, atol=1e-5)
    part = levels[3, :group], weight[3, :group], used[:group]
    undamped = (part[2] * part[1] * part[0]).sum() / (part[2] * part[0] ** 2).sum()
    assert found[3, 0] == pytest.approx(float(undamped), abs=0.05)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("group", GROUPS)
def test_no_half_step_of_a_group_refit_raises_the_error(size: int, group: int) -> None:
    weight, s, members, used = group_problem(group, seed=size)
    lut = make_codebook(Codebook.UNIFORM, size)
    errors = [slow_error(weight, quantized(weight, s, members, lut), used)]
    for _ in range(4):
        levels = lookup(lut, assign(safe_ratio(weight, s @ members), lut, affine=True))
        after = refit_groups(weight, s, members, lut, used, steps=1, affine=True)
        s = _solve_groups(levels**2 * used, weight * levels * used, members, s)
        assert torch.allclose(after, s, rtol=1e-4, atol=1e-6)
        errors.append(slow_error(weight, levels * (s @ members), used))
        errors.append(slow_error(weight, quantized(weight, s, members, lut), used))
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def channel_problem(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W, s, f, h and balanced levels."""
    weight, _, _, used = problem(seed)
    lut = make_codebook(Codebook.BALANCED, size)
    spec = linear_spec(scale=ScaleForm.CHANNEL)
    s, b = initial_factors(weight, spec, float(lut.max()))
    return weight, s, b[0, :1], used, lut


def slow_levels(weight: Tensor, scale: Tensor, lut: Tensor) -> Tensor:
    """The level nearest to each W / S, found among all of them."""
    return lut[((weight / scale)[..., None] - lut).abs().argmin(dim=-1)]


def slow_share(weight: Tensor, levels: Tensor, unit: Tensor, used: Tensor) -> float:
    """argmin over x of sum_ij h_j (W_ij - x Q_ij unit_i)^2 as a loop."""
    products = squares = 0.0
    for row, q_row, one in zip(weight.tolist(), levels.tolist(), unit.tolist(), strict=True):
        for w, q, h in zip(row, q_row, used.tolist(), strict=True):
            products += h * w * q * one
            squares += h * (q * one) ** 2
    return products / squares


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_channel_refit_is_the_loop_and_no_half_step_raises_the_error(size: int, seed: int) -> None:
    weight, s, f, used, lut = channel_problem(size, seed)
    start = s, f
    errors = [slow_error(weight, slow_levels(weight, s * f, lut) * s * f, used)]
    for half in ("f", "f", "f", "s", "s", "s"):
        levels = slow_levels(weight, s * f, lut)
        if half == "f":
            f = torch.tensor([slow_share(weight, levels, s[:, 0], used)])
        else:
            rows = zip(weight, levels, strict=True)
            s = torch.tensor([[slow_share(w[None], q[None], f, used)] for w, q in rows])
        errors.append(slow_error(weight, levels * s * f, used))
        errors.append(slow_error(weight, slow_levels(weight, s * f, lut) * s * f, used))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    found = refit_channels(weight, *start, lut, used, steps=3, affine=True)
    assert torch.allclose(found[0], s, rtol=1e-4) and torch.allclose(found[1], f, rtol=1e-4)
    assert float(f) != 1.0  # the clip moved


def test_two_bits_are_clipped_more_than_four() -> None:
    clips = []
    for size in (4, 16):
        weight, s, f, used, lut = channel_problem(size)
        clips.append(float(refit_channels(weight, s, f, lut, used, steps=5, affine=True)[1]))
    assert clips[0] < 0.9 < clips[1]


def test_what_nothing_decides_stays() -> None:
    weight, s, f, used, _ = channel_problem(4)
    levels = torch.ones(OUT, IN)
    levels[3] = 0.0  # this row's weights are 0 under every scale
    moments = levels**2 * used, weight * levels * used
    after = solve_channels(*moments, f, s)
    assert after[3] == s[3] and (after[4:] != s[4:]).all()
    nothing = torch.zeros(OUT, IN)
    assert torch.equal(solve_clip(nothing, nothing, s, f), f)


@pytest.mark.parametrize("form", ScaleForm)
def test_refit_is_that_of_the_form(form: ScaleForm) -> None:
    weight, _, _, used = problem()
    spec = linear_spec(scale=form, group_size=8, lut_size=4, refit_steps=3)
    lut = make_codebook(spec.codebook, 4)
    a, b = initial_factors(weight, spec, 1.0)
    before = weighted_error(weight, quantized(weight, a, b, lut), used)
    found = []
    for importance in (used, torch.ones(IN)):
        after = refit(weight, a, b, lut, importance, spec)
        assert torch.equal(after[1], b) is (form is ScaleForm.GROUP)
        found.append(weighted_error(weight, quantized(weight, *after, lut), used))
    assert found[0] < found[1] < before


def test_refit_factors_lowers_the_weighted_error_more_than_an_unweighted_refit() -> None:
    weight, a, b, used = problem()
    lut = make_codebook(Codebook.UNIFORM, 4)
    before = weighted_error(weight, quantized(weight, a, b, lut), used)
    found = []
    for importance in (used, torch.ones(IN)):
        factors = refit_factors(weight, a, b, lut, importance, steps=4, affine=True)
        found.append(weighted_error(weight, quantized(weight, *factors, lut), used))
    assert found[0] < found[1] < before


@pytest.mark.parametrize("codebook", [Codebook.UNIFORM, Codebook.KMEANS])
def test_refit_of_extreme_weights_stays_finite(codebook: Codebook) -> None:
    lut = make_codebook(codebook, 4)
    for weight in (torch.zeros(8, 16), 1e-7 * problem()[0], 1e4 * problem()[0]):
        a, b = initial_scale(weight, group_size=8, rank=2, range_share=1.0, lut_max=1.0)
        used = torch.zeros(weight.shape[1])
        used[0] = 1.0  # all the others are never used
        a, b = refit_factors(weight, a, b, lut, used, steps=2, affine=codebook.is_affine)
        assert a.isfinite().all() and b.isfinite().all()
        spec = linear_spec(scale=ScaleForm.GROUP, group_size=8, codebook=codebook, refit_steps=2)
        s, _ = refit(weight, *initial_factors(weight, spec, 1.0), lut, used, spec)
        assert s.isfinite().all()
        spec = linear_spec(scale=ScaleForm.CHANNEL, codebook=codebook, refit_steps=2)
        s, b = refit(weight, *initial_factors(weight, spec, 1.0), lut, used, spec)
        assert s.isfinite().all() and b.isfinite().all()


def test_balance_keeps_the_product() -> None:
    _, a, b, _ = problem()
    left, right = balance(a * 1e3, b * 1e-2)
    assert torch.allclose(left @ right, 10 * (a @ b), rtol=1e-4, atol=1e-4)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)


def test_fit_codebook_lowers_the_weighted_error() -> None:
    weight, a, b, used = problem()
    scale = a @ b

    def error(lut: Tensor) -> float:
        levels = lookup(lut, assign(safe_ratio(weight, scale), lut, affine=False))
        return weighted_error(weight, levels * scale, used)

    fitted = fit_codebook(weight, a, b, 4, used)
    assert error(fitted) < 0.9 * error(make_codebook(Codebook.UNIFORM, 4))
    assert error(fitted) < error(fit_codebook(weight, a, b, 4, torch.ones(IN)))
