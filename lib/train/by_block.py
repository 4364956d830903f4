"""Training one decoder block after the other: what the methods `layerwise` and `blockwise` share.

A block that is done is kept in the scratch folder, so a killed run goes on with the block it was
at; inside a block the training loop resumes by itself.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lib.base.errors import CorruptError, InputError, NonFiniteError, ParamsError
from lib.base.files import atomic_file, read_sealed, sha256_file, write_sealed
from lib.cache.shards import CacheReader
from lib.model.blocks import block_prefix, decoder_blocks, part, run_part
from lib.model.linear import LutLinear
from lib.model.surgery import quantized_layers
from lib.objective.lesson import CachedLoss, CachedRows
from lib.objective.loss import EVAL_BATCH
from lib.params.training import TrainConfig
from lib.train.activations import on
from lib.train.average import Values
from lib.train.loop import Report, Trainer
from lib.train.roles import Trainable, select
from lib.train.state import Progress

Row = dict[str, float | int | None]


@dataclass(frozen=True)
class Task:
    """A model, what it learns from, and where; the first arguments of a :class:`Trainer`."""

    model: PreTrainedModel
    params: TrainConfig
    objective: CachedLoss
    train: CachedRows
    val: CacheReader
    device: torch.device
    scratch: Path


class BlockMethod(ABC):
    """How blocks train."""

    def __init__(self, task: Task) -> None:
        self.task = task
        # with EMA the parameters of the trained blocks that were not averaged
        self.plain: Values = {}

    def own(self, number: int) -> PreTrainedModel:
        """A block of the model that trains, as a part of its own."""
        return part(self.task.model, number, number + 1, norm=False)

    def numbers(self) -> Sequence[int]:
        """The blocks that train, ascending: all of them."""
        return range(len(decoder_blocks(self.task.model)))

    def epochs(self, step: int) -> float:
        """Passes over the training sequences that so many steps are."""
        return step / self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one pass."""
        params = self.task.params
        return self.sequences / (params.batch_size * params.grad_accum)

    @property
    @abstractmethod
    def sequences(self) -> int:
        """Training sequences that are used."""

    @abstractmethod
    def steps(self, block: int) -> int:
        """Optimizer steps of a block."""

    @abstractmethod
    def trainer(self, block: int, scratch: Path) -> Trainer:
        """The run that trains a block; those before it are done."""

    def held_out_kd(self) -> float:
        """Held-out KD of the whole model as it is now."""
        task = self.task
        count = task.params.eval_sequences
        return held_out_kd(task.model, task.objective, task.val, count, task.device)


def trainables_of(model: PreTrainedModel, params: TrainConfig, block: int) -> list[Trainable]:
    """What of one block ``params`` let train; nothing else requires a gradient afterwards.

    Raises:
        ParamsError: nothing does.
    """
    prefix = block_prefix(model, block)
    chosen = []
    for item in select(model, params):
        inside = item.name.startswith(prefix)
        item.parameter.requires_grad_(inside)
        if inside:
            chosen.append(item)
    if not chosen:
        raise ParamsError(
            f"nothing of block {block} trains; change freeze_last_mlp or train_mlp_only"
        )
    return chosen


@torch.no_grad()
def held_out_kd(
    model: PreTrainedModel,
    objective: CachedLoss,
    val: CacheReader,
    sequences: int,
    device: torch.device,
) -> float:
    """Mean held-out KD of the whole model, one block at a time on the device."""
    ids, _ = val.sequences(sequences)
    starts = range(0, len(ids), EVAL_BATCH)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    with on(device, embed):
        hidden = [embed(ids[start : start + EVAL_BATCH].to(device)) for start in starts]
    count = len(decoder_blocks(model))
    for number in range(count):
        view = part(model, number, number + 1, norm=number == count - 1)
        with on(device, view):
            hidden = [run_part(view, x) for x in hidden]
    kd, positions = 0.0, 0
    measure = objective.measured()
    with on(device, head):
        for start, x in zip(starts, hidden, strict=True):
            rows = np.arange(start, min(start + EVAL_BATCH, len(ids)))
            sums = measure.of_hidden(model, x, val.batch(rows).to(device)).sums()
            kd += float(sums.held)
            positions += int(sums.count)
    return kd / max(positions, 1)


def _layers(model: PreTrainedModel, block: int) -> dict[str, LutLinear]:
    prefix = block_prefix(model, block)
    return {name: m for name, m in quantized_layers(model).items() if name.startswith(prefix)}


def _files(folder: Path, block: int) -> list[Path]:
    """Where the tensors of a trained block wait: its layers', and those that were not averaged."""
    return [folder / f"{block:03d}{kind}.safetensors" for kind in ("", "-plain")]


def _keep(model: PreTrainedModel, block: int, folder: Path, rows: list[Row], plain: Values) -> None:
    """Write a trained block; the JSON comes last and says that it is whole."""
    tensors = {
        f"{name}.{key}": value.cpu().contiguous()
        for name, layer in _layers(model, block).items()
        for key, value in layer.state_dict().items()
    }
    digests = []
    for path, values in zip(_files(folder, block), (tensors, plain), strict=True):
        with atomic_file(path) as temporary:
            save_file(values, temporary)
        digests.append(sha256_file(path))
    write_sealed(folder / f"{block:03d}.json", {"rows": rows, "sha256": digests})


def _take(model: PreTrainedModel, block: int, folder: Path) -> tuple[list[Row], Values] | None:
    """Put a trained block back into the model and return its rows and plain parameters; None if it
    is not done, or was damaged since."""
    about = folder / f"{block:03d}.json"
    if not about.is_file():
        return None
    files = _files(folder, block)
    try:
        kept = read_sealed(about)
        for path, digest in zip(files, kept["sha256"], strict=True):
            if not path.is_file() or sha256_file(path) != digest:
                raise CorruptError(f"{path} is damaged")
    except CorruptError as error:
        print(f"training block {block} anew, what was kept is unusable: {error}", file=sys.stderr)
        return None
    tensors, plain = map(load_file, files)
    for name, layer in _layers(model, block).items():
        inside = {key: tensors[f"{name}.{key}"] for key in layer.state_dict()}
        layer.load_state_dict(inside)
    return kept["rows"], plain


def _start(method: BlockMethod, folder: Path) -> float:
    """Held-out KD before anything trained; a resumed run knows it from its first start."""
    path = folder / "start.json"
    with contextlib.suppress(InputError, CorruptError):
        return float(read_sealed(path)["initial_kd"])
    initial = method.held_out_kd()
    write_sealed(path, {"initial_kd": initial})
    return initial


def _train_one(
    method: BlockMethod, block: int, scratch: Path, overall: Progress, report: Report
) -> tuple[list[Row], Values]:
    """Train one block; its rows, steps counted over all blocks, and its plain parameters."""
    first, before = overall.step, list(overall.rows)

    def rows_of(progress: Progress) -> list[Row]:
        return [
            {
                **row,
                "step": first + int(row["step"] or 0),
                "block": block,
                "epoch": round(method.epochs(int(row["step"] or 0)), 4),
            }
            for row in progress.rows
        ]

    def follow(progress: Progress) -> None:
        overall.step = first + progress.step
        overall.rows = before + rows_of(progress)
        report(overall)

    trainer = method.trainer(block, scratch)
    try:
        result = trainer.run(follow)
    except NonFiniteError as error:
        raise NonFiniteError(f"block {block}: {error}") from None
    trainer.model.cpu()  # blocks wait in main memory
    name, progress = trainer.loss.name, result.progress
    print(
        f"block {block}: {method.epochs(progress.step):g} epochs, held-out {name} loss "
        f"{progress.initial_loss:.4g} -> {progress.best_loss:.4g}",
        file=sys.stderr,
        flush=True,
    )
    return rows_of(progress), result.plain


def train_by_block(method: BlockMethod, scratch: Path, report: Report) -> Progress:
    """Train the method's blocks in order, in place.

    Returns:
        the record of all of them; ``initial_loss`` and ``best_loss`` are the whole model's KD
        before and after.

    Raises:
        NonFiniteError: names block, step and layer. Blocks that were done stay done.
    """
    folder = scratch / "blocks"
    folder.mkdir(parents=True, exist_ok=True)
    initial = _start(method, folder)
    overall = Progress(initial_loss=initial, best_loss=initial, last_loss=initial)
    overall.rows.append({"step": 0, "val_kd_loss": overall.initial_loss})
    for block in method.numbers():
        before = list(overall.rows)
        done = _take(method.task.model, block, folder)
        if done is None:
            inside = scratch / f"block-{block:03d}"
            done = _train_one(method, block, inside, overall, report)
            _keep(method.task.model, block, folder, *done)
            shutil.rmtree(inside, ignore_errors=True)
        rows, plain = done
        method.plain.update(plain)
        overall.rows = before + rows
        overall.step = int(rows[-1]["step"] or 0)
    overall.last_loss = overall.best_loss = method.held_out_kd()
    overall.best_step = overall.step
    overall.rows.append({"step": overall.step, "val_kd_loss": overall.best_loss})
    return overall
