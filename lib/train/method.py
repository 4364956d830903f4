"""Which way a stage trains its model: end to end, or one decoder block after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.model.blocks import BlockLoader, decoder_blocks
from lib.model.scores import block_scores, read_scores
from lib.params.methods import Blockwise, Layerwise
from lib.params.training import Method
from lib.train.blockwise import BlockwiseMethod, block_epochs
from lib.train.by_block import BlockMethod, Task
from lib.train.layerwise import LayerwiseMethod
from lib.train.source import check_teacher


@dataclass(frozen=True, kw_only=True)
class ByBlock:
    """What block after block needs beside a training section.

    Attributes:
        teacher: folder of the full-precision model.
        scores: JSON of the stage `sensitivity`, read where ``blockwise.adaptive`` is above 0.
    """

    method: Method
    teacher: Path
    scores: Path
    layerwise: Layerwise
    blockwise: Blockwise

    def identity(self, teacher: str) -> dict[str, Any]:
        """What defines such a run beside its params; checks that the teacher is the model's.

        Args:
            teacher: fingerprint of the teacher that the model is distilled from.

        Raises:
            MismatchError: another one lies in the folder.
        """
        check_teacher(self.teacher, teacher)
        return {"scores": read_scores(self.scores)} if self.blockwise.adaptive else {}

    def make(self, task: Task) -> BlockMethod:
        """The method on one model and cache."""
        loader = BlockLoader(self.teacher)
        if self.method == "layerwise":
            return LayerwiseMethod(task, full=loader.block, layerwise=self.layerwise)
        return BlockwiseMethod(
            task,
            full=loader.block,
            embeddings=loader.embeddings(),
            blockwise=self.blockwise,
            epochs=self._epochs(len(decoder_blocks(task.model))),
        )

    def _epochs(self, blocks: int) -> list[float]:
        base, adaptive = self.blockwise.epochs, self.blockwise.adaptive
        if not adaptive:
            return [base] * blocks
        return block_epochs(base, adaptive, block_scores(read_scores(self.scores), blocks))


def by_block(
    method: Method, teacher: Path, scores: Path, layerwise: Layerwise, blockwise: Blockwise
) -> ByBlock | None:
    """The method of a section, None where it is end to end."""
    if method == "e2e":
        return None
    return ByBlock(
        method=method, teacher=teacher, scores=scores, layerwise=layerwise, blockwise=blockwise
    )
