"""What the training loop asks of a regularizer, and the one that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from lib.params.training import LoopConfig
from lib.train.roles import Trainable

HeldOut = Callable[[], float]
"""The held-out loss of the model as it is at the call."""


class Penalty(Protocol):
    """A regularizer of one run. Everything it remembers is in its state, or the same every time."""

    def after_backward(self) -> None:
        """The gradients of a step's loss are complete, and not clipped yet."""

    def after_step(self, rate_factor: float) -> None:
        """The optimizer has taken a step.

        Args:
            rate_factor: learning rates of this step, as a share of the full ones.
        """

    def measure(self, held_out: HeldOut, column: str) -> dict[str, float]:
        """Columns of the log at an evaluation; ``column``, the loss that the best step is chosen
        by, is among them. Leaves the model as it is."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""

    def finish(self) -> None:
        """The model has its best parameters: make it an ordinary quantized one again."""


MakePenalty = Callable[[PreTrainedModel, list[Trainable], LoopConfig], Penalty]
"""From the model (on its device), what of it trains, and the section."""


class NoPenalty:
    """Nothing is added to the loss."""

    def after_backward(self) -> None:
        """Nothing."""

    def after_step(self, rate_factor: float) -> None:
        """Nothing."""

    def measure(self, held_out: HeldOut, column: str) -> dict[str, float]:
        """The held-out loss alone."""
        return {column: held_out()}

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def no_penalty(
    _model: PreTrainedModel, _trainables: list[Trainable], _params: LoopConfig
) -> Penalty:
    """The maker of :class:`NoPenalty`."""
    return NoPenalty()
