"""Method `blockwise`: each decoder block learns the full-precision block's outputs.

Block-wise training of all parameters (EfficientQAT, "Block-AP"): targets are the full-precision
model's hidden states, inputs come from the quantized blocks in front. Gradients, moments and
activations of one block are in memory at a time, and only one block is on the device. More epochs
for more sensitive blocks: ``epochs * (1 + adaptive * (score - min) / (max - min))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.cache.shards import CacheReader
from lib.model.blocks import decoder_blocks, part
from lib.objective.distillation import Objective
from lib.objective.local import BlockBatches, BlockLoss
from lib.params.methods import Blockwise
from lib.params.training import TrainConfig
from lib.train.activations import Blocks, Chain
from lib.train.by_block import held_out_kd, trainables_of
from lib.train.loop import Trainer


def block_epochs(base: float, adaptive: float, scores: Sequence[float]) -> list[float]:
    """Epochs of each block; equal scores give every block ``base``."""
    low, span = min(scores), max(scores) - min(scores)
    return [base * (1 + adaptive * ((s - low) / span if span > 0 else 0.0)) for s in scores]


class BlockwiseMethod:
    """Block after block.

    Args:
        full: blocks of the full-precision model; embeddings: its input embeddings.
        epochs: of each block, :func:`block_epochs`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        params: TrainConfig,
        objective: Objective,
        train: CacheReader,
        val: CacheReader,
        device: torch.device,
        scratch: Path,
        *,
        full: Blocks,
        embeddings: nn.Module,
        blockwise: Blockwise,
        epochs: Sequence[float],
    ) -> None:
        self.model, self.objective, self.val, self.device = model, objective, val, device
        self.params, self.blockwise, self._epochs = params, blockwise, epochs
        self._lengths: dict[str, Tensor] = {}
        self._chains: dict[tuple[str, str], Chain] = {}

        def own(number: int) -> nn.Module:
            return part(model, number, number + 1, norm=False)

        counts = {"train": blockwise.sequences or len(train), "val": params.eval_sequences}
        for split, reader in (("train", train), ("val", val)):
            ids, self._lengths[split] = reader.sequences(counts[split])
            for kind, embed, blocks in (
                ("own", model.get_input_embeddings(), own),
                ("full", embeddings, full),
            ):
                self._chains[split, kind] = Chain(
                    scratch / "hidden" / f"{split}-{kind}",
                    ids,
                    model.config.hidden_size,
                    embed,
                    blocks,
                    device,
                )

    @property
    def _steps_per_epoch(self) -> float:
        together = self.params.batch_size * self.params.grad_accum
        return len(self._lengths["train"]) / together

    def numbers(self) -> Sequence[int]:
        """All blocks."""
        return range(len(decoder_blocks(self.model)))

    def steps(self, block: int) -> int:
        """Fractions of an epoch count: 2.5 epochs are two and a half passes."""
        return max(1, round(self._epochs[block] * self._steps_per_epoch))

    def epochs(self, step: int) -> float:
        """Passes over the training sequences."""
        return step / self._steps_per_epoch

    def held_out_kd(self) -> float:
        """Held-out KD of the whole model as it is now."""
        return held_out_kd(
            self.model, self.objective, self.val, self.params.eval_sequences, self.device
        )

    def _data(self, split: str, block: int) -> BlockBatches:
        inputs = self._chains[split, "own"].before(block)
        targets = self._chains[split, "full"].before(block + 1)
        return BlockBatches(inputs, targets, self._lengths[split])

    def trainer(self, block: int, scratch: Path) -> Trainer:
        """The run of one block, judged after every epoch."""
        trained = trainables_of(self.model, self.params, block)
        steps = self.steps(block)
        params = self.params.model_copy(
            update={
                "steps": steps,
                "warmup_steps": min(self.params.warmup_steps, steps),
                "eval_every": max(1, round(self._steps_per_epoch)),
                "clip": self.blockwise.clip,
            }
        )
        train, val = (self._data(split, block) for split in ("train", "val"))
        view = part(self.model, block, block + 1, norm=False)
        return Trainer(
            view,
            params,
            BlockLoss(),
            train,
            val,
            self.device,
            scratch,
            trainables=trained,
            patience=self.blockwise.patience,
        )
