"""Hidden states between decoder blocks, on disk and memory-mapped: what one block is trained on.

A chain is one model's hidden states over the same sequences, ``[N, L, D]`` float32 in front of each
block. Two files exist while one is made of the other, otherwise one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib.base.errors import InputError
from lib.base.files import atomic_file
from lib.model.blocks import run_part

BATCH = 8  # sequences per forward pass

Blocks = Callable[[int], nn.Module]
"""Block by number, as a part of its own (:func:`lib.model.blocks.part`)."""


@contextlib.contextmanager
def on(device: torch.device, module: nn.Module) -> Iterator[None]:
    """Have a module on a device, and then back where it was."""
    home = next((parameter.device for parameter in module.parameters()), device)
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


class Chain:
    """The hidden states of one model, block after block.

    Args:
        folder: where the files go; what a killed run left there is used.
        ids: long ``[N, L]``; embed: ids to ``[B, L, D]``.
        width: D.

    Raises:
        InputError: the disk has no room for the two files that exist at a time.
    """

    def __init__(
        self,
        folder: Path,
        ids: Tensor,
        width: int,
        embed: nn.Module,
        blocks: Blocks,
        device: torch.device,
    ) -> None:
        self.folder, self.ids, self.embed, self.blocks = folder, ids, embed, blocks
        self.shape = (*ids.shape, width)
        self.device = device
        folder.mkdir(parents=True, exist_ok=True)
        need, free = 2 * 4 * int(np.prod(self.shape)), shutil.disk_usage(folder).free
        if not any(folder.iterdir()) and need > free:
            raise InputError(
                f"the hidden states of {len(ids)} sequences take {need / 1e9:.1f} GB, {folder} has "
                f"{free / 1e9:.1f} GB free; use fewer or shorter sequences, or make room"
            )

    def _path(self, block: int) -> Path:
        return self.folder / f"before-{block:03d}.npy"

    @torch.no_grad()
    def _write(self, block: int, values: Callable[[slice], Tensor]) -> None:
        with atomic_file(self._path(block)) as temporary:
            states = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=np.float32, shape=self.shape
            )
            for start in range(0, len(self.ids), BATCH):
                rows = slice(start, start + BATCH)
                states[rows] = values(rows).float().cpu().numpy()
            states.flush()

    def before(self, block: int) -> np.ndarray:
        """Inputs of a block, ``[N, L, D]``, read-only; computed from the nearest earlier file.

        Blocks in front of it have to be as they will stay. Files of earlier blocks are deleted.
        """
        known = block
        while known >= 0 and not self._path(known).is_file():
            known -= 1
        if known < 0:
            known = 0
            with on(self.device, self.embed):
                self._write(0, lambda rows: self.embed(self.ids[rows].to(self.device)))
        for number in range(known, block):
            inputs, view = np.load(self._path(number), mmap_mode="r"), self.blocks(number)

            def step(rows: slice, view: nn.Module = view, x: np.ndarray = inputs) -> Tensor:
                return run_part(view, torch.from_numpy(x[rows].copy()).to(self.device))

            with on(self.device, view):
                self._write(number + 1, step)
        for number in range(block):
            self._path(number).unlink(missing_ok=True)
        values: np.ndarray = np.load(self._path(block), mmap_mode="r")
        return values
