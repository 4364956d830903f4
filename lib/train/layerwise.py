"""Method `layerwise`: one decoder layer at a time, judged by its own MLP and by the whole model.

What the trained blocks in front of a layer make of the training text is computed once, not in every
step; the rest of the model runs, because the KD term is at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.cache.shards import CacheReader
from lib.model.blocks import decoder_blocks, part
from lib.objective.distillation import Objective
from lib.objective.local import LayerLoss, TailBatches
from lib.params.methods import Layerwise
from lib.params.training import TrainConfig
from lib.train.activations import Blocks, Chain
from lib.train.by_block import held_out_kd, trainables_of
from lib.train.loop import Trainer


class LayerwiseMethod:
    """Layer after layer, ``params.steps`` steps each.

    Args:
        full: blocks of the full-precision model.
        numbers: the layers that train; None = all.
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
        layerwise: Layerwise,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.model, self.full, self.objective, self.device = model, full, objective, device
        self.train, self.val, self.params, self.layerwise = train, val, params, layerwise
        self._numbers = numbers
        self._chains = {
            name: Chain(
                scratch / "hidden" / name,
                reader.sequences(count)[0],
                model.config.hidden_size,
                model.get_input_embeddings(),
                lambda number: part(model, number, number + 1, norm=False),
                device,
            )
            for name, reader, count in (
                ("train", train, layerwise.sequences or len(train)),
                ("val", val, params.eval_sequences),
            )
        }

    def numbers(self) -> Sequence[int]:
        """All layers, or those that were asked for."""
        return self._numbers or range(len(decoder_blocks(self.model)))

    def steps(self, block: int) -> int:
        """The same for every layer."""
        return self.params.steps

    def epochs(self, step: int) -> float:
        """Passes over the training sequences."""
        together = self.params.batch_size * self.params.grad_accum
        return step * together / len(self._chains["train"].ids)

    def held_out_kd(self) -> float:
        """Held-out KD of the whole model as it is now."""
        return held_out_kd(
            self.model, self.objective, self.val, self.params.eval_sequences, self.device
        )

    def trainer(self, block: int, scratch: Path) -> Trainer:
        """The run of one layer."""
        trained = trainables_of(self.model, self.params, block)
        full: Any = decoder_blocks(self.full(block))[0]
        loss = LayerLoss(
            objective=self.objective,
            block=block,
            mlp=full.mlp.to(self.device),
            local_weight=self.layerwise.local_weight,
            global_weight=self.layerwise.global_weight,
            tokens=self.layerwise.tokens,
        )
        train, val = (
            TailBatches(reader, self._chains[name].before(block))
            for name, reader in (("train", self.train), ("val", self.val))
        )
        # layers that trained on the same few sequences would all learn those by heart
        params = self.params.model_copy(update={"seed": self.params.seed + block})
        return Trainer(
            self.model, params, loss, train, val, self.device, scratch, trainables=trained
        )
