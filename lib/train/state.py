"""What a killed training run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.base.errors import CorruptError
from lib.base.files import atomic_folder, bring_back, read_sealed, sha256_file, write_sealed
from lib.base.workers import is_main, world_size
from lib.train.parallel import part_of, whole
from lib.train.roles import Trainable

TENSORS = "state.safetensors"
VALUES = "state.json"


@dataclass
class Progress:
    """Position and record of a run; everything but the tensors.

    ``step`` counts finished optimizer steps; ``best_step`` 0 is the state before the first one.
    """

    step: int = 0
    initial_loss: float = 0.0
    best_loss: float = float("inf")
    best_step: int = 0
    last_loss: float = 0.0
    rows: list[dict[str, float | int | None]] = field(default_factory=list)


def _rng_tensors() -> dict[str, Tensor]:
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng.cuda.{index}"] = state
    return tensors


def _rng_values() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _restore_rng(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    cuda = sorted((k for k in tensors if k.startswith("rng.cuda.")), key=lambda k: int(k[9:]))
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[key] for key in cuda])
    kind, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))


def save_state(
    folder: Path,
    trainables: list[Trainable],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    extra: dict[str, Tensor],
) -> None:
    """Write the state atomically as ``folder``.

    Args:
        extra: further tensors by name (best parameters, moving averages).
    """
    tensors = {f"parameter.{t.name}": t.parameter.detach() for t in trainables}
    for item in trainables:
        for key, value in optimizer.state.get(item.parameter, {}).items():
            tensors[f"optimizer.{key}.{item.name}"] = value
    tensors.update({f"extra.{name}": value for name, value in extra.items()})
    tensors.update(_rng_tensors())
    # every process has to ask for what is sharded, one of them writes
    complete = {k: whole(v).cpu().contiguous() for k, v in tensors.items()}
    if not is_main():
        return
    with atomic_folder(folder) as temporary:
        save_file(complete, temporary / TENSORS)
        values = {"progress": progress.__dict__, "rng": _rng_values()}
        write_sealed(temporary / VALUES, {**values, "sha256": sha256_file(temporary / TENSORS)})


def _intact(folder: Path) -> dict[str, Any] | None:
    """The values of a state; None, said on stderr, where it is not what was saved."""
    try:
        values = read_sealed(folder / VALUES)
        if values["sha256"] != sha256_file(folder / TENSORS):
            raise CorruptError(f"{folder / TENSORS} is damaged")
    except CorruptError as error:
        if is_main():
            print(f"beginning anew, the saved state is unusable: {error}", file=sys.stderr)
        return None
    return values


def load_state(
    folder: Path, trainables: list[Trainable], optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]] | None:
    """Restore what :func:`save_state` wrote; None when there is nothing (whole) to resume from.

    The folder is renamed into place as a whole, so one that lacks a file is not ours to trust; one
    whose digests are not its files' was damaged since, and the run begins anew.
    """
    if world_size() == 1:  # several would do it at once
        bring_back(folder)
    if not (folder / TENSORS).is_file() or not (folder / VALUES).is_file():
        return None
    values = _intact(folder)
    if values is None:
        return None
    tensors = load_file(folder / TENSORS)
    by_name = {item.name: item.parameter for item in trainables}
    with torch.no_grad():
        for name, parameter in by_name.items():
            parameter.copy_(part_of(tensors[f"parameter.{name}"], parameter))
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            parameter = by_name[name]
            if value.shape == parameter.shape:
                # fused kernels walk through memory: the moments need the parameter's strides
                moments = torch.empty_like(parameter, dtype=value.dtype)
                value = moments.copy_(part_of(value, parameter))
            # and the step counter where the parameter is
            optimizer.state[parameter][kind] = value.to(parameter.device)
    _restore_rng(tensors, values["rng"])
    extra = {k[len("extra.") :]: v for k, v in tensors.items() if k.startswith("extra.")}
    return Progress(**values["progress"]), extra


_FIRST_COLUMNS = ("step", "loss", "kd_loss", "val_kd_loss", "rate_factor", "gradient_norm")


def rows_to_csv(rows: list[dict[str, float | int | None]]) -> str:
    """The loss log: one line per logged step, empty cells for what was not measured."""
    more = dict.fromkeys(key for row in rows for key in row if key not in _FIRST_COLUMNS)
    columns = (*_FIRST_COLUMNS, *more)

    def cell(value: float | int | None) -> str:
        return "" if value is None else json.dumps(value)

    lines = [",".join(columns)]
    lines += [",".join(cell(row.get(column)) for column in columns) for row in rows]
    return "\n".join(lines) + "\n"
