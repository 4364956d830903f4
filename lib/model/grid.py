"""The grid of a quantized layer whose scales and LUT stay as they are, and its masters on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.base.errors import MismatchError
from lib.model.linear import LutLinear
from lib.quant.kernels import grid_points, pull_to_grid
from lib.quant.prox import row_steps, saturated, share_of, within


@dataclass(frozen=True)
class Fit:
    """How well masters fit their grid."""

    distance: float
    """D, mean squared distance in steps of the row."""
    hit_rate: float
    """Share of the weights within the tolerance of their grid point."""
    sat_rate: float
    """Share of the weights outside the outermost levels, by more than the tolerance."""


class LayerGrid:
    """Where the masters of one layer can snap to. Distances are in steps of the row
    (:func:`lib.quant.prox.row_steps`), and so are tolerances.

    Raises:
        MismatchError: the layer is snapped and has no masters.
    """

    @torch.no_grad()
    def __init__(self, layer: LutLinear) -> None:
        if layer.weight is None:
            raise MismatchError("a snapped layer has no master weights to compare with their grid")
        self.layer = layer
        self.weight = layer.weight
        self.steps = row_steps(self._scale(), layer.levels())

    def _scale(self) -> Tensor:
        a, b = self.layer.factors()
        return a @ b

    @torch.no_grad()
    def pull(self, strength: Tensor) -> Tensor:
        """One proximal step of all masters, in place.

        Args:
            strength: scalar, 0 or more.

        Returns:
            the sum of squared distances afterwards.
        """
        rows = pull_to_grid(
            self.weight.detach(),
            self._scale(),
            self.layer.levels(),
            share_of(strength),
            affine=self.layer.affine,
        )
        return (rows / self.steps.square()).sum() / (1 + strength).square()

    @torch.no_grad()
    def sums(self, atol: float) -> Tensor:
        """(sum of squared distances, number of hits, number of saturated masters), ``[3]``."""
        weight, scale, lut = self.weight.detach(), self._scale(), self.layer.levels()
        grid = grid_points(weight, scale, lut, self.layer.affine)
        reach = atol * self.steps
        rows = (weight - grid).square().sum(dim=1) / self.steps.square()
        hits, outside = within(weight, grid, reach), saturated(weight, scale, lut, reach)
        return torch.stack([rows.sum(), hits.float().sum(), outside.float().sum()])

    @torch.no_grad()
    def snap(self, atol: float) -> None:
        """Put the masters within ``atol`` on their grid points, in place; infinity takes all."""
        grid = grid_points(self.weight, self._scale(), self.layer.levels(), self.layer.affine)
        near = within(self.weight, grid, atol * self.steps)
        self.weight.copy_(torch.where(near, grid, self.weight))


def fits(grids: Mapping[str, LayerGrid], atol: float) -> tuple[Fit, dict[str, Fit]]:
    """How well all masters together fit their grids, and those of each layer."""
    counts = [grid.weight.numel() for grid in grids.values()]
    rows = torch.stack([grid.sums(atol) for grid in grids.values()]).tolist()
    each = {
        name: Fit(*(value / count for value in row))
        for name, row, count in zip(grids, rows, counts, strict=True)
    }
    overall = Fit(*(sum(column) / sum(counts) for column in zip(*rows, strict=True)))
    return overall, each


@contextlib.contextmanager
def hardened(grids: Sequence[LayerGrid], atol: float) -> Iterator[None]:
    """While this holds, masters within ``atol`` (infinity: all) are their grid points; afterwards
    they are what they were, bit for bit."""
    kept = [grid.weight.detach().clone() for grid in grids]
    try:
        for grid in grids:
            grid.snap(atol)
        yield
    finally:
        for grid, values in zip(grids, kept, strict=True):
            grid.weight.detach().copy_(values)
