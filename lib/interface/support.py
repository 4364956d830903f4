"""What the functions of the Python API share: where a model comes from, sections from keyword
arguments, the data of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError, ParamsError
from lib.cache.shards import CacheReader
from lib.model.surgery import has_masters
from lib.objective.lesson import CachedLoss, CachedRows
from lib.params.base import Section
from lib.params.training import Distill, TrainConfig
from lib.train.run import lesson_of

_S = TypeVar("_S", bound=Section)
_INFO = "lutqat_info"  # attribute of a model: where it comes from, kept in its checkpoints


def info_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where a model comes from; empty if nobody said."""
    return dict(getattr(model, _INFO, {}))


def set_info(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Say where a model comes from."""
    setattr(model, _INFO, info)


def teacher_of(model: PreTrainedModel) -> str:
    """Fingerprint of the teacher that a model is, or comes from."""
    mark = info_of(model).get("teacher")
    if mark is None:
        raise InputError("the model does not say which teacher it comes from; use load_teacher()")
    return str(mark)


class TrainingData(NamedTuple):
    """What a training learns from, and what it is judged on."""

    cache: CacheReader
    rows: CachedRows  # of the cache, as the loss takes them
    val: CacheReader
    loss: CachedLoss


def training_data(
    model: PreTrainedModel, cache: Path, params: TrainConfig, temperature: float, target: str
) -> TrainingData:
    """Training and held-out cache of a model's teacher, and what is learned from them."""
    distill = section(Distill, {"temperature": temperature, "target": target}, "train")
    if not has_masters(model):
        raise MismatchError("the model has no master weights to train; quantize() a teacher first")
    expect = {
        "teacher": teacher_of(model),
        "vocab_size": model.config.get_text_config().vocab_size,
    }
    train_set, val_set = (CacheReader(cache / split, expect) for split in ("train", "val"))
    loss, rows = lesson_of(params, distill, train_set, val_set)
    return TrainingData(train_set, rows, val_set, loss)


def section(kind: type[_S], values: dict[str, Any], where: str) -> _S:
    """A section of params.yaml from keyword arguments."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ParamsError(f"{where}: {key} is not a known key; there are {known}") from None
        raise ParamsError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from None
