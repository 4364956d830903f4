"""Zero-shot accuracy on multiple-choice tasks, measured by lm-eval.

lm-eval belongs to an extra and is loaded when tasks are asked for. It sums the log-probabilities of
each choice behind the prompt: `acc` takes the choice of the largest sum, `acc_norm` that of the
largest sum per character of the choice.
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
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float


class TaskSuite:
    """Tasks that are loaded once and then measured on any number of models.

    Nothing is drawn at random: no examples stand before an item, and a limit takes the first ones,
    as lm-eval's own does.

    Args:
        names: tasks of `evaluate.tasks`; without any, lm-eval is not needed.
        items: at most so many of each task; 0 = all.

    Raises:
        InputError: lm-eval is not installed, or the data of a task cannot be had.
    """

    def __init__(self, names: Sequence[str], items: int) -> None:
        self._limit = items or None
        self._tasks = _load(names) if names else {}

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
                found = evaluate(lm=reader, task_dict=loaded, limit=self._limit, log_samples=True)
            (task,) = loaded["tasks"]
            scores[name] = _score(found["results"][task], found["samples"][task])
        return scores


def task_config(name: str, items: Sequence[Item]) -> dict[str, Any]:
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
            for metric in ("acc", "acc_norm")
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
            config = task_config(name, read_set(name))
            with _quiet():
                loaded[name] = manager.load([config])
        else:
            with _quiet(), _from_hub(name):
                loaded[name] = manager.load([name])
        for single in loaded[name]["tasks"].values():
            single.set_config(key="num_fewshot", value=0)
    return loaded


def _score(result: dict[str, Any], samples: list[dict[str, Any]]) -> Score:
    """What lm-eval found; a model of nan would otherwise seem to take the first choice always."""
    sums = [float(total) for sample in samples for total, _ in sample["filtered_resps"]]
    if not all(math.isfinite(total) for total in sums):
        nan = math.nan
        return Score(items=len(samples), acc=nan, acc_stderr=nan, acc_norm=nan, acc_norm_stderr=nan)
    return Score(
        items=len(samples),
        acc=float(result["acc,none"]),
        acc_stderr=_number(result["acc_stderr,none"]),
        acc_norm=float(result["acc_norm,none"]),
        acc_norm_stderr=_number(result["acc_norm_stderr,none"]),
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
