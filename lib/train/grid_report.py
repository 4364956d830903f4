"""How well a trained model's masters fit their grid: grid.json, grid.svg and a few metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from lib.base.figures import write_svg
from lib.base.files import write_json
from lib.model.grid import Fit, LayerGrid, fits
from lib.model.scores import by_kind
from lib.model.surgery import quantized_layers


@dataclass(frozen=True)
class GridReport:
    """All quantized layers of one model.

    Attributes:
        atol: distance up to which a weight counts as on the grid, in steps between levels.
    """

    atol: float
    overall: Fit
    layers: dict[str, Fit]

    def metrics(self) -> dict[str, float]:
        """The numbers of the whole model."""
        fit = self.overall
        return {
            "grid_distance": fit.distance,
            "hit_rate": fit.hit_rate,
            "sat_rate": fit.sat_rate,
        }

    def write(self, folder: Path) -> None:
        """Write grid.json and grid.svg into ``folder``."""
        write_json(folder / "grid.json", asdict(self))
        write_svg(folder / "grid.svg", self._draw())

    def _draw(self) -> Figure:
        """Hit and saturation rate of every layer over its decoder block, a line per projection."""
        figure = Figure(figsize=(10, 6), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        titles = (
            ("hit_rate", f"within {self.atol:g} steps of the grid"),
            ("sat_rate", "outside the outermost levels"),
        )
        for axes, (rate, title) in zip(panels, titles, strict=True):
            values = {name: getattr(fit, rate) for name, fit in self.layers.items()}
            for kind, points in by_kind(values).items():
                axes.plot(list(points), list(points.values()), ".-", linewidth=0.8, label=kind)
            axes.set_ylim(bottom=0)
            axes.set_ylabel("share of weights")
            axes.set_title(f"{title}: {getattr(self.overall, rate):.2%} of all")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(fontsize="small", ncols=4)
        panels[1].set_xlabel("decoder block")
        return figure


def grid_report(model: nn.Module, atol: float) -> GridReport:
    """The report on a model with masters."""
    grids = {name: LayerGrid(layer) for name, layer in quantized_layers(model).items()}
    return GridReport(atol, *fits(grids, atol))
