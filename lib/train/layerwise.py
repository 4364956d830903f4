"""Method `layerwise`: one decoder layer at a time, judged by its own MLP and by the whole model.

What the trained blocks in front of a layer make of the training text is computed once, not in every
step; the rest of the model runs, because the KD term is at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.model.blocks import decoder_blocks
from lib.objective.local import LayerLoss, TailBatches
from lib.params.methods import Layerwise
from lib.train.activations import Blocks, Chain
from lib.train.by_block import BlockMethod, Task, trainables_of
from lib.train.loop import Trainer


class LayerwiseMethod(BlockMethod):
    """Layer after layer, ``params.steps`` steps each.

    Args:
        full: blocks of the full-precision model.
        numbers: the layers that train; None = all.
    """

    def __init__(
        self,
        task: Task,
        *,
        full: Blocks,
        layerwise: Layerwise,
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(task)
        self.full, self.layerwise, self._numbers = full, layerwise, numbers
        self._chains = {
            name: Chain(
                task.scratch / "hidden" / name,
                reader.sequences(count)[0],
                task.model.config.hidden_size,
                task.model.get_input_embeddings(),
                self.own,
                task.device,
            )
            for name, reader, count in (
                ("train", task.train, layerwise.sequences or len(task.train)),
                ("val", task.val, task.params.eval_sequences),
            )
        }

    def numbers(self) -> Sequence[int]:
        """All layers, or those that were asked for."""
        return self._numbers or super().numbers()

    @property
    def sequences(self) -> int:
        """Training sequences that are used."""
        return len(self._chains["train"].ids)

    def steps(self, block: int) -> int:
        """The same for every layer."""
        return self.task.params.steps

    def trainer(self, block: int, scratch: Path) -> Trainer:
        """The run of one layer."""
        task = self.task
        trained = trainables_of(task.model, task.params, block)
        full: Any = decoder_blocks(self.full(block))[0]
        loss = LayerLoss(
            objective=task.objective,
            block=block,
            mlp=full.mlp.to(task.device),
            local_weight=self.layerwise.local_weight,
            global_weight=self.layerwise.global_weight,
            tokens=self.layerwise.tokens,
        )
        train, val = (
            TailBatches(reader, self._chains[name].before(block))
            for name, reader in (("train", task.train), ("val", task.val))
        )
        # layers that trained on the same few sequences would all learn those by heart
        params = task.params.model_copy(update={"seed": task.params.seed + block})
        return Trainer(
            task.model, params, loss, train, val, task.device, scratch, trainables=trained
        )
