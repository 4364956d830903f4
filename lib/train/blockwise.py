"""Method `blockwise`: each decoder block learns the full-precision block's outputs.

Block-wise training of all parameters (EfficientQAT, "Block-AP"): targets are the full-precision
model's hidden states, inputs come from the quantized blocks in front. Gradients, moments and
activations of one block are in memory at a time, and only one block is on the device. More epochs
for more sensitive blocks: ``epochs * (1 + adaptive * (score - min) / (max - min))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from lib.objective.local import BlockBatches, BlockLoss
from lib.params.methods import Blockwise
from lib.train.activations import Blocks, Chain
from lib.train.by_block import BlockMethod, Task, trainables_of
from lib.train.loop import Trainer


def block_epochs(base: float, adaptive: float, scores: Sequence[float]) -> list[float]:
    """Epochs of each block; equal scores give every block ``base``."""
    low, span = min(scores), max(scores) - min(scores)
    return [base * (1 + adaptive * ((s - low) / span if span > 0 else 0.0)) for s in scores]


class BlockwiseMethod(BlockMethod):
    """Block after block.

    Args:
        full: blocks of the full-precision model; embeddings: its input embeddings.
        epochs: of each block, :func:`block_epochs`.
    """

    def __init__(
        self,
        task: Task,
        *,
        full: Blocks,
        embeddings: nn.Module,
        blockwise: Blockwise,
        epochs: Sequence[float],
    ) -> None:
        super().__init__(task)
        self.blockwise, self._epochs = blockwise, epochs
        self._lengths: dict[str, Tensor] = {}
        self._chains: dict[tuple[str, str], Chain] = {}
        for split, reader, count in (
            ("train", task.train, blockwise.sequences or len(task.train)),
            ("val", task.val, task.params.eval_sequences),
        ):
            ids, self._lengths[split] = reader.sequences(count)
            for kind, embed, blocks in (
                ("own", task.model.get_input_embeddings(), self.own),
                ("full", embeddings, full),
            ):
                self._chains[split, kind] = Chain(
                    task.scratch / "hidden" / f"{split}-{kind}",
                    ids,
                    task.model.config.hidden_size,
                    embed,
                    blocks,
                    task.device,
                )

    @property
    def sequences(self) -> int:
        """Training sequences that are used."""
        return len(self._lengths["train"])

    def steps(self, block: int) -> int:
        """Fractions of an epoch count: 2.5 epochs are two and a half passes."""
        return max(1, round(self._epochs[block] * self.steps_per_epoch))

    def _data(self, split: str, block: int) -> BlockBatches:
        inputs = self._chains[split, "own"].before(block)
        targets = self._chains[split, "full"].before(block + 1)
        return BlockBatches(inputs, targets, self._lengths[split])

    def trainer(self, block: int, scratch: Path) -> Trainer:
        """The run of one block, judged after every epoch."""
        task, steps = self.task, self.steps(block)
        trained = trainables_of(task.model, task.params, block)
        params = task.params.model_copy(
            update={
                "steps": steps,
                "warmup_steps": min(task.params.warmup_steps, steps),
                "eval_every": max(1, round(self.steps_per_epoch)),
                "clip": self.blockwise.clip,
            }
        )
        train, val = (self._data(split, block) for split in ("train", "val"))
        return Trainer(
            self.own(block),
            params,
            BlockLoss(),
            train,
            val,
            task.device,
            scratch,
            trainables=trained,
            patience=self.blockwise.patience,
        )
