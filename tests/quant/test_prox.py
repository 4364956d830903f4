"""Distances, pull and coefficient of proximal training against loops, autograd and plants."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from lib.params.prox import Prox
from lib.quant.codebook import make_codebook
from lib.quant.kernels import grid_points, pull_to_grid
from lib.quant.prox import (
    Course,
    DualControl,
    GammaSchedule,
    mean_square,
    relative,
    row_steps,
    saturated,
    scheduled,
    share_of,
    within,
)
from lib.quant.spec import Codebook

LUTS = {
    "uniform": make_codebook(Codebook.UNIFORM, 4),
    "balanced": make_codebook(Codebook.BALANCED, 16),
    "uneven": torch.tensor([-1.0, -0.25, 0.5, 2.0]),
}


def operands() -> tuple[Tensor, Tensor]:
    """Weights and scales; some scales negative, some 0, some weights far outside."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 9, generator=generator)
    scale = torch.randn(6, 9, generator=generator)
    scale[1, :3] = 0.0
    weight[1, 0] = 0.0
    weight[2] *= 20
    return weight, scale


def slow(weight: Tensor, scale: Tensor, lut: Tensor) -> list[list[float]]:
    """The nearest grid point of each weight, looking at all of them."""
    rows = []
    for w_row, s_row in zip(weight.tolist(), scale.tolist(), strict=True):
        points = [[level * s for level in lut.tolist()] for s in s_row]
        near = [min(p, key=lambda q: abs(q - w)) for w, p in zip(w_row, points, strict=True)]
        rows.append(near)
    return rows


@pytest.mark.parametrize("name", LUTS)
def test_grid_distances_hits_and_saturation_against_loops(name: str) -> None:
    lut, (weight, scale) = LUTS[name], operands()
    grid = grid_points(weight, scale, lut, name != "uneven")
    torch.testing.assert_close(grid, torch.tensor(slow(weight, scale, lut)))
    steps = row_steps(scale, lut)
    levels = lut.tolist()
    for i in range(6):
        square = sum(s * s for s in scale[i].tolist()) / 9
        spacing = (levels[-1] - levels[0]) / (len(levels) - 1)
        assert float(steps[i]) == pytest.approx(spacing * math.sqrt(square), rel=1e-5)
    reach = 0.1 * steps
    hits, outside = within(weight, grid, reach), saturated(weight, scale, lut, reach)
    for i in range(6):
        for j in range(9):
            w, s, far = float(weight[i, j]), float(scale[i, j]), float(reach[i])
            assert bool(hits[i, j]) == (abs(w - float(grid[i, j])) <= far)
            ends = sorted((levels[0] * s, levels[-1] * s))
            assert bool(outside[i, j]) == (w < ends[0] - far or w > ends[1] + far)
    assert 0 < hits.sum() < hits.numel() and 0 < outside.sum() < outside.numel()
    assert not (hits & outside).any()


def test_weights_that_know_nothing_of_the_grid_are_a_twelfth_away() -> None:
    weight = torch.rand(64, 4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for size in (4, 16):
        lut, scale = make_codebook(Codebook.UNIFORM, size), torch.full((64, 4096), 1.0)
        scale[32:] = 3.0  # any size of the rows
        away = scale * weight - grid_points(scale * weight, scale, lut, True)
        distance = (away / row_steps(scale, lut)[:, None]).square().mean()
        assert float(distance) == pytest.approx(1 / 12, rel=0.01)


@pytest.mark.parametrize("strength", [1e-3, 0.5, 40.0])
@pytest.mark.parametrize("name", LUTS)
def test_the_pull_is_the_minimum_that_autograd_finds(name: str, strength: float) -> None:
    lut, (weight, scale) = LUTS[name], operands()
    affine = name != "uneven"
    grid = grid_points(weight, scale, lut, affine)
    moved = weight.clone()
    share = share_of(torch.tensor(strength))
    rows = pull_to_grid(moved, scale, lut, share, affine=affine)
    torch.testing.assert_close(rows, (weight - grid).square().sum(dim=1))
    v = moved.clone().requires_grad_(True)
    objective = (v - weight).square().sum() / 2 + strength * (v - grid).square().sum() / 2
    (gradient,) = torch.autograd.grad(objective, v)
    assert float(gradient.abs().max()) < 1e-4 * float(weight.abs().max()) * (1 + strength)
    # and for a small strength a step along the gradient of the distance, 2 (w - q)
    w = weight.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((w - grid).square().sum(), w)
    torch.testing.assert_close(slope, 2 * (weight - grid))
    if strength < 0.01:
        torch.testing.assert_close(moved, weight - strength / 2 * slope, atol=1e-4, rtol=1e-3)
    # no weight passes its grid point, however strong the pull
    assert ((moved - grid) * (weight - grid) >= -1e-6).all()


@pytest.mark.parametrize("course", get_args(Course))
def test_courses_have_their_ends_and_rise(course: Course) -> None:
    values = [scheduled(course, 0.01, 0.16, done / 8) for done in range(9)]
    assert values[0] == pytest.approx(0.01) and values[-1] == pytest.approx(0.16)
    assert values == sorted(values)
    middle = {"linear": 0.085, "cosine": 0.085, "exponential": 0.04}[course]
    assert values[4] == pytest.approx(middle)
    quarter = {"linear": 0.0475, "cosine": 0.01 + 0.15 * (1 - math.sqrt(0.5)) / 2}
    if course in quarter:
        assert values[2] == pytest.approx(quarter[course])
    control = GammaSchedule(course=course, start=0.01, end=0.16, steps=9)
    state, seen = control.first(), []
    for step in range(1, 11):
        seen.append(float(state[0]))
        state = control.next(state, step, torch.tensor(5.0))
    assert seen[:9] == pytest.approx(values) and seen[9] == pytest.approx(0.16)


def test_courses_of_the_params_are_those_of_the_mathematics() -> None:
    assert set(get_args(Prox.model_fields["schedule"].annotation)) == set(get_args(Course))


def run_plant(
    control: DualControl, *, gain: float, drift: list[float], start: float
) -> tuple[list[float], list[float]]:
    """``D <- D - gain lambda D + drift``; the distances and coefficients."""
    distance, state = start, control.first()
    distances, coefficients = [], []
    for number, push in enumerate(drift, start=1):
        distance += -gain * float(state[0]) * distance + push
        state = control.next(state, number, torch.tensor(distance))
        distances.append(distance)
        coefficients.append(float(state[0]))
    return distances, coefficients


@pytest.mark.parametrize("gain", [0.5, 2.0])
@pytest.mark.parametrize("drift", [2e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("start", [0.09, 5e-4])
def test_the_controller_brings_a_plant_to_its_target(
    gain: float, drift: float, start: float
) -> None:
    control = DualControl(target=0.005, k_i=1e-3, k_p=0.05, largest=5.0)
    distances, coefficients = run_plant(control, gain=gain, drift=[drift] * 2000, start=start)
    assert distances[-1] == pytest.approx(0.005, rel=0.02)
    assert coefficients[-1] == pytest.approx(drift / (gain * 0.005), rel=0.05)


def test_the_documented_gains_bring_a_long_run_to_its_target() -> None:
    values = Prox()
    control = DualControl(
        target=values.beta, k_i=values.k_i, k_p=values.k_p, largest=values.lambda_max
    )
    distances, _ = run_plant(control, gain=2.0, drift=[1e-4] * 3000, start=1 / 12)
    assert distances[-1] == pytest.approx(values.beta, rel=0.05)


def unclipped(
    *, target: float, k_i: float, k_p: float, largest: float, drift: list[float], start: float
) -> list[float]:
    """The textbook controller whose integral goes on while its output is at the limit."""
    distance, integral, coefficient = start, 0.0, 0.0
    found = []
    for push in drift:
        distance += -2.0 * coefficient * distance + push
        error = max(-3.0, min(3.0, math.log(distance / target)))
        integral += k_i * error
        coefficient = max(0.0, min(largest, integral + k_p * error))
        found.append(distance)
    return found


def test_a_target_out_of_reach_winds_nothing_up() -> None:
    """The largest coefficient is not enough at first; later it is far too much."""
    values = {"target": 0.005, "k_i": 1e-3, "k_p": 0.05, "largest": 0.05}
    drift = [1e-3] * 1000 + [1e-4] * 1000
    distances, coefficients = run_plant(DualControl(**values), gain=2.0, drift=drift, start=0.09)
    assert coefficients[999] == pytest.approx(0.05)
    assert distances[999] == pytest.approx(1e-3 / (2 * 0.05), rel=0.01)
    assert coefficients[1000] < 0.05  # it leaves its limit at once
    settled = distances[1300:]
    assert max(abs(d / 0.005 - 1) for d in settled) < 0.1
    wound = unclipped(**values, drift=drift, start=0.09)
    assert max(abs(d / 0.005 - 1) for d in wound[1300:]) > 0.5


def test_the_coefficient_is_never_negative_and_survives_a_distance_of_0() -> None:
    control = DualControl(target=0.005, k_i=0.1, k_p=1.0, largest=2.0)
    state = control.next(control.first(), 1, torch.tensor(0.0))
    assert state.tolist() == [0.0, -3.0, 1.0]
    state = control.next(state, 2, torch.tensor(1e9))
    assert state[0] == 2.0 and state.isfinite().all()


def test_scores_relative_to_their_mean() -> None:
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert float(mean_square(gradient)) == pytest.approx(float(gradient.square().mean()), rel=1e-6)
    assert relative(torch.tensor([1.0, 3.0, 8.0])).tolist() == [0.25, 0.75, 2.0]
    assert relative(torch.zeros(2)).tolist() == [1.0, 1.0]
