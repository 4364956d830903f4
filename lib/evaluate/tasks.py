"""Zero-shot accuracy on multiple-choice tasks, measured by lm-eval.

lm-eval belongs to an extra and is loaded when tasks are asked for. It sums the log-probabilities of
each choice behind the prompt: `acc` takes the choice of the largest sum, `acc_norm` that of the
largest sum per character of the choice. BoolQ and WinoGrande have `acc` alone.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.errors import InputError
from lib.base.progress import track
from lib.evaluate.choices import SETS, Item, read_set

ROWS_PER_BATCH = 8  # choices of similar length; their logits are alive at once, twice
SPLIT = "test"  # what the only split of a set of ours is called


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of right choices among ``items`` questions, each with its standard error.

    All are nan for a model whose log-probabilities are not finite, the errors for a single item.
    """

    items: int
    of: int
    """Questions that the task has."""
    acc: float
    acc_stderr: float
    acc_norm: float | None
    """None, with its error, where the task is not normalized."""
    acc_norm_stderr: float | None

    @property
    def shown(self) -> tuple[float, float]:
        """The accuracy that the task is known by, and its standard error."""
        if self.acc_norm is None or self.acc_norm_stderr is None:
            return self.acc, self.acc_stderr
        return self.acc_norm, self.acc_norm_stderr


class TaskSuite:
    """Tasks that are loaded once and then measured on any number of models.

    No examples stand before an item. Where there are more items than asked for, ``seed`` draws
    them, the same for every model: some sets are in the order of their sources.

    Args:
        names: tasks of `evaluate.tasks`; without any, lm-eval is not needed.
        items: at most so many of each task; 0 = all.

    Raises:
        InputError: lm-eval is not installed, or the data of a task cannot be had.
    """

    def __init__(self, names: Sequence[str], items: int, seed: int) -> None:
        self._tasks = _load(names) if names else {}
        self._chosen = {name: _draw(self._size(name), items, seed) for name in self._tasks}

    def _size(self, name: str) -> int:
        (task,) = self._tasks[name]["tasks"].values()
        return len(task.eval_docs)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str
    ) -> dict[str, Score]:
        """The model's score on every task, by name; the model and the tokenizer stay as they are.

        Args:
            label: the model, in a word, for the progress shown.
        """
        if not self._tasks:
            return {}
        with _quiet():
            reader = _part("models.huggingface").HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
                batch_size=ROWS_PER_BATCH,
            )
            evaluate: Callable[..., Any] = _part("evaluator").evaluate
        scores = {}
        for name in track(self._tasks, len(self._tasks), f"{label}: tasks"):
            loaded = self._tasks[name]
            with _quiet():
                (task,) = loaded["tasks"]
                samples = {task: self._chosen[name]}
                found = evaluate(lm=reader, task_dict=loaded, samples=samples, log_samples=True)
            scores[name] = _score(found["results"][task], found["samples"][task], self._size(name))
        return scores


def _draw(size: int, items: int, seed: int) -> list[int] | None:
    """Which of ``size`` items are asked: ``items`` of them (0 = all), ascending; None for all."""
    if not 0 < items < size:
        return None
    return sorted(np.random.default_rng(seed).permutation(size)[:items].tolist())


def task_config(
    name: str, items: Sequence[Item], metrics: Sequence[str] = ("acc", "acc_norm")
) -> dict[str, Any]:
    """lm-eval's description of a task made of these items.

    The data set is handed over in memory: one of files would be copied into the user's cache, and
    its use reported to the hub.
    """
    rows = [asdict(item) for item in items]

    def make(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {SPLIT: Dataset.from_list(rows)}

    return {
        "task": name,
        "custom_dataset": make,
        "test_split": SPLIT,
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
    }


def _load(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's loaded tasks, by our names."""
    with _quiet():
        # Its own tasks are thousands of files to look through: not for sets of ours alone.
        manager = _part("tasks").TaskManager(include_defaults=any(n not in SETS for n in names))
    loaded = {}
    for name in names:
        if name in SETS:
            config = task_config(name, read_set(name), SETS[name].metrics)
            with _quiet():
                loaded[name] = manager.load([config])
        else:
            with _quiet(), _from_hub(name):
                loaded[name] = manager.load([name])
        for single in loaded[name]["tasks"].values():
            single.set_config(key="num_fewshot", value=0)
    return loaded


def _score(result: dict[str, Any], samples: list[dict[str, Any]], size: int) -> Score:
    """What lm-eval found; a model of nan would otherwise seem to take the first choice always."""
    sums = [float(total) for sample in samples for total, _ in sample["filtered_resps"]]
    known = all(math.isfinite(total) for total in sums)

    def value(key: str) -> float:
        return _number(result[f"{key},none"]) if known else math.nan

    normalized = "acc_norm,none" in result
    return Score(
        items=len(samples),
        of=size,
        acc=value("acc"),
        acc_stderr=value("acc_stderr"),
        acc_norm=value("acc_norm") if normalized else None,
        acc_norm_stderr=value("acc_norm_stderr") if normalized else None,
    )


def _number(value: Any) -> float:
    """nan where lm-eval says "N/A"."""
    return math.nan if isinstance(value, str) else float(value)


def _part(name: str) -> Any:
    """A module of lm-eval.

    Raises:
        InputError: it is not installed.
    """
    try:
        importlib.import_module("lm_eval")
        return importlib.import_module(f"lm_eval.{name}")
    except ImportError as error:
        raise InputError(
            "evaluate.tasks needs the optional extra 'tasks': pip install --no-deps -r "
            f"requirements-tasks.txt, or set evaluate.tasks to [] ({error})"
        ) from None


@contextlib.contextmanager
def _from_hub(name: str) -> Iterator[None]:
    """Load a task's data without the download being counted for its publisher.

    Raises:
        InputError: they cannot be had.
    """
    from datasets import config
    from datasets.exceptions import DatasetsError

    counting = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the data of task {name} cannot be read from the hub ({reason}); check the network "
            f"and your access, or use {', '.join(SETS)}"
        ) from None
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counting


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's bars and remarks; errors are not affected."""
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield
