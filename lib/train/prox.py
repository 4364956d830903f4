"""Proximal QAT: the weights train as floats, and after every step they are pulled to their grid.

While such a run lasts, the selected layers are plain ones that compute with their master weights
(the same parameters, under the same names). What the run is judged by is the model on its grid.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import ParamsError
from lib.base.workers import is_main
from lib.model.grid import LayerGrid, fits, hardened
from lib.model.linear import LutLinear, ParameterRole
from lib.model.surgery import is_mlp, master_linear, replace_module
from lib.params.prox import Prox
from lib.params.training import LoopConfig, Regularizer
from lib.quant.average import moved_average
from lib.quant.prox import Control, DualControl, GammaSchedule, mean_square, relative
from lib.train.penalty import HeldOut, MakePenalty, Penalty, no_penalty
from lib.train.roles import Trainable

SOFT = "val_soft_kd_loss"
"""Column of the held-out loss of the float model."""
SELECTIVE = "val_selective_kd_loss"
"""Column of the held-out loss with only those weights on the grid that are near it."""


def penalty_of(regularizer: Regularizer, prox: Prox) -> MakePenalty:
    """The penalty that `weights.regularizer` names."""
    if regularizer == "none":
        return no_penalty

    def make(model: PreTrainedModel, trainables: list[Trainable], params: LoopConfig) -> Penalty:
        return ProxPenalty(model, trainables, params, prox)

    return make


def selected(trainables: list[Trainable], select: str) -> dict[str, LutLinear]:
    """The layers, by name, whose weights train and that `prox.select` names.

    Raises:
        ParamsError: there are none.
    """
    wanted = {"mlp": (True,), "attention": (False,), "all_linear": (True, False)}[select]
    layers = {}
    for item in trainables:
        name = item.name.removesuffix(f".{item.local_name}")
        if item.role is not ParameterRole.WEIGHT or is_mlp(name) not in wanted:
            continue
        assert isinstance(item.layer, LutLinear)
        layers[name] = item.layer
    if not layers:
        raise ParamsError(
            f"prox.select = {select}: no such layer trains; change it, train_mlp_only or "
            "freeze_last_mlp"
        )
    return layers


def control_of(prox: Prox, steps: int) -> Control:
    """What moves the coefficient over a run of so many steps."""
    if prox.control == "dual":
        return DualControl(target=prox.beta, k_i=prox.k_i, k_p=prox.k_p, largest=prox.lambda_max)
    return GammaSchedule(
        course=prox.schedule, start=prox.gamma_start, end=prox.gamma_end, steps=steps
    )


class ProxPenalty:
    """The regularizer of one run. Replaces the selected layers of ``model`` until :meth:`finish`.

    Raises:
        ParamsError: see :func:`selected`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainables: list[Trainable],
        params: LoopConfig,
        prox: Prox,
    ) -> None:
        self.model, self.prox, self.steps = model, prox, params.steps
        self.layers = selected(trainables, prox.select)
        self.grids = {name: LayerGrid(layer) for name, layer in self.layers.items()}
        self.weights = sum(grid.weight.numel() for grid in self.grids.values())
        for name, layer in self.layers.items():
            replace_module(model, name, master_linear(layer))
        self.control = control_of(prox, params.steps)
        device = next(iter(self.grids.values())).weight.device
        self.coefficient = self.control.first().to(device)
        self.fisher = torch.zeros(len(self.layers), device=device)
        self.done = 0

    def after_backward(self) -> None:
        """Note how large the gradients of the loss are in each layer."""
        if not self.prox.fisher:
            return
        gradients = [grid.weight.grad for grid in self.grids.values()]
        now = torch.stack([mean_square(g) for g in gradients if g is not None])
        moved = moved_average(self.fisher, now, self.prox.fisher_beta)
        # a loss scaler lets gradients overflow now and then, and skips the step
        self.fisher = torch.where(now.isfinite().all(), moved, self.fisher)

    def after_step(self, rate_factor: float) -> None:
        """Pull every selected weight towards its grid point, and move the coefficient.

        The pull follows the learning rate, so that a coefficient means the same in warm-up and at
        the end.
        """
        strengths = self.coefficient[0] * rate_factor * torch.ones_like(self.fisher)
        if self.prox.fisher:
            strengths = strengths * relative(self.fisher)
        sums = [grid.pull(s) for grid, s in zip(self.grids.values(), strengths, strict=True)]
        self.done += 1
        distance = torch.stack(sums).sum() / self.weights
        self.coefficient = self.control.next(self.coefficient, self.done, distance)

    def measure(self, held_out: HeldOut, column: str) -> dict[str, float]:
        """Held-out losses on the grid (``column``) and off it, and how well the weights fit."""
        soft = held_out()
        grids = list(self.grids.values())
        with hardened(grids, math.inf):
            columns = {column: held_out(), SOFT: soft}
        if self.prox.hard == "selective":
            with hardened(grids, self.prox.atol):
                columns[SELECTIVE] = held_out()
        fit, _ = fits(self.grids, self.prox.atol)
        if self.done in (0, self.steps) and is_main():
            when = "final" if self.done else "initial"
            print(
                f"{when} held-out loss: {columns[column]:.4f} on the grid, {soft:.4f} off it; "
                f"{fit.hit_rate:.1%} of the weights within {self.prox.atol:g} steps of it",
                file=sys.stderr,
            )
        return {
            **columns,
            "prox_distance": fit.distance,
            "prox_coefficient": float(self.coefficient[0]),
            "hit_rate": fit.hit_rate,
            "sat_rate": fit.sat_rate,
        }

    def state(self) -> dict[str, Tensor]:
        """Coefficient with the controller's memory, Fisher averages, and steps done."""
        done = torch.tensor(self.done)
        return {"coefficient": self.coefficient, "fisher": self.fisher, "done": done}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.coefficient = state["coefficient"].to(self.coefficient.device)
        self.fisher = state["fisher"].to(self.fisher.device)
        self.done = int(state["done"])

    def finish(self) -> None:
        """Quantized layers again; with `hard: selective` the near weights stay on the grid."""
        if self.prox.hard == "selective":
            for grid in self.grids.values():
                grid.snap(self.prox.atol)
        for name, layer in self.layers.items():
            replace_module(self.model, name, layer)
