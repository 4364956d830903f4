"""The proximal regularizer: how far weights are from their grid, the pull towards it, and the
coefficient of that pull (docs/math.md, "Proximal QAT").

    q = LUT[idx] * S, idx nearest        the grid point of a weight
    d = (W - q) / step                   its distance, in steps of its row
    D = mean(d^2)                        1/12 for weights that know nothing of the grid

Shapes: W, q, S ``[out, in]``; LUT ``[n]``, sorted; steps ``[out]``. Source: Bai, Wang, Liberty,
"ProxQuant" (2018), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lib.quant.scales import MIN_MAXABS

_FURTHEST = 3.0  # largest error that counts in one step: a factor of 20 between D and its target

Course = Literal["linear", "cosine", "exponential"]


def row_steps(scale: Tensor, lut: Tensor) -> Tensor:
    """Distance between neighbouring levels, root mean square over each row, ``[out]``.

    One value per row, not ``|S|`` of each weight: a low-rank S passes zero, where a weight would be
    infinitely many steps away.
    """
    spacing = (lut[-1] - lut[0]) / (lut.numel() - 1)
    return (spacing * scale.square().mean(dim=1).sqrt()).clamp_min(MIN_MAXABS)


def share_of(strength: Tensor) -> Tensor:
    """How much of its distance a weight loses in one proximal step.

    ``argmin_v (v - w)^2 / 2 + strength (v - q)^2 / 2`` is ``w - share (w - q)`` with
    ``share = strength / (1 + strength)``: below 1 for any strength, where an explicit step along
    the gradient would pass the grid point.
    """
    return strength / (1 + strength)


def within(weight: Tensor, grid: Tensor, reach: Tensor) -> Tensor:
    """Whether each weight is at most ``reach [out]`` from its grid point, bool ``[out, in]``."""
    return (weight - grid).abs() <= reach[:, None]


def saturated(weight: Tensor, scale: Tensor, lut: Tensor, reach: Tensor) -> Tensor:
    """Whether each weight lies more than ``reach [out]`` outside its outermost levels, bool."""
    low, high = scale * lut[0], scale * lut[-1]  # the other way round where S is negative
    inside = torch.minimum(
        torch.maximum(weight, torch.minimum(low, high)), torch.maximum(low, high)
    )
    return (weight - inside).abs() > reach[:, None]


def scheduled(course: Course, start: float, end: float, done: float) -> float:
    """A coefficient on its way from ``start`` to ``end``.

    Args:
        done: share of the run, 0 to 1. `exponential` multiplies by the same factor in every step,
            so that neither end may be 0.
    """
    match course:
        case "linear":
            return start + (end - start) * done
        case "cosine":
            return start + (end - start) * 0.5 * (1 - math.cos(math.pi * done))
        case "exponential":
            return start * (end / start) ** done


class Control(Protocol):
    """How the coefficient moves. Its state is a tensor ``[3]`` whose first entry is the coefficient
    of the coming step; no number has to leave the device for it."""

    def first(self) -> Tensor:
        """State before the first step."""

    def next(self, state: Tensor, steps: int, distance: Tensor) -> Tensor:
        """State after so many steps, given D as it is then."""


@dataclass(frozen=True, kw_only=True)
class GammaSchedule:
    """A given course over ``steps`` steps, whatever the distance does."""

    course: Course
    start: float
    end: float
    steps: int

    def first(self) -> Tensor:
        """The start."""
        return torch.tensor([self.start, 0.0, 0.0])

    def next(self, state: Tensor, steps: int, distance: Tensor) -> Tensor:
        """The course, which ends with the last step."""
        done = min(1.0, steps / max(1, self.steps - 1))
        value = scheduled(self.course, self.start, self.end, done)
        coefficient = torch.full_like(state[:1], value)
        return torch.cat([coefficient, state[1:]])


@dataclass(frozen=True, kw_only=True)
class DualControl:
    """A dual variable that a PI controller moves until the distance is ``target``.

        lambda_(t+1) = clip(lambda_t + k_i e_t + k_p (e_t - e_(t-1)), 0, largest)
        e = log(D / target), at most 3 in size

    In the logarithm, one step of the pull takes the same amount off e however far D is from its
    target, so one pair of gains serves all. In this form the only integral is lambda itself:
    clipped, it cannot wind up.
    """

    target: float
    k_i: float
    k_p: float
    largest: float

    def first(self) -> Tensor:
        """Coefficient 0; no error yet."""
        return torch.zeros(3)

    def next(self, state: Tensor, steps: int, distance: Tensor) -> Tensor:
        """One move of the controller; the state is (lambda, e, whether there is an e)."""
        coefficient, before, known = state
        error = (distance / self.target).log().clamp(-_FURTHEST, _FURTHEST)
        change = torch.where(known > 0, error - before, torch.zeros_like(error))
        moved = coefficient + self.k_i * error + self.k_p * change
        return torch.stack([moved.clamp(0.0, self.largest), error, torch.ones_like(error)])


def mean_square(gradient: Tensor) -> Tensor:
    """Mean of the squared entries, a scalar; nothing of the gradient's size is made."""
    return torch.linalg.vector_norm(gradient).square() / gradient.numel()


def relative(scores: Tensor) -> Tensor:
    """Scores ``[k]`` over their mean; 1 each where all are 0."""
    mean = scores.mean()
    return torch.where(mean > 0, scores / mean, torch.ones_like(scores))
