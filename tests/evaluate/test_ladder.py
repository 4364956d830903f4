"""The ladder over tiny models, and its files."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.evaluate import ladder as ladder_module
from lib.evaluate.choices import Item
from lib.evaluate.ladder import HeldOut, Ladder, Rung, measure_ladder
from lib.evaluate.perplexity import perplexity
from lib.evaluate.report import metrics, to_json, to_markdown, write_ladder
from lib.evaluate.tasks import Score, TaskSuite
from lib.model.surgery import quantize_model, quantized_layers
from lib.model.tiny import random_teacher
from lib.params.schema import Evaluate
from lib.quant.spec import Codebook, LinearSpec, ModelSpec, ScaleForm

CPU = torch.device("cpu")
FILES = ("ladder.json", "ladder.md", "ladder.svg", "samples.json", "metrics.json")


def _params(**changes: Any) -> Evaluate:
    values = {
        "perplexity_window": 16,
        "perplexity_stride": 8,
        "perplexity_tokens": 60,
        "sequences": 4,
        "prompts": ["Hi", "What is 2+2?"],
        "new_tokens": 4,
        "seed": 0,
    }
    return Evaluate(**{**values, **changes})


def _text() -> HeldOut:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 250, (9, 20)).astype(np.int32)
    lengths = np.array([20, 20, 8, 20, 20, 5, 20, 20, 20], dtype=np.int32)
    return HeldOut(
        stream=rng.integers(3, 250, 100).astype(np.int32), input_ids=ids, lengths=lengths
    )


def _teacher() -> PreTrainedModel:
    return random_teacher("llama", seed=0)[0]


def _quantized(lut_size: int) -> PreTrainedModel:
    model = _teacher()
    spec = LinearSpec(
        lut_size=lut_size,
        rank=4,
        group_size=16,
        scale=ScaleForm.LOWRANK,
        codebook=Codebook.UNIFORM,
    )
    quantize_model(model, ModelSpec(mlp=spec, attention=spec))
    return model


def _broken() -> PreTrainedModel:
    model = _quantized(4)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    return model


def _measure(rungs: list[Rung], **changes: Any) -> Ladder:
    tokenizer = random_teacher("llama", seed=0)[1]
    return measure_ladder(rungs, _text(), tokenizer, _params(**changes), CPU)


def _rungs() -> list[Rung]:
    return [
        Rung(name="teacher", load=_teacher),
        Rung(name="sixteen", load=lambda: _quantized(16)),
        Rung(name="four", load=lambda: _quantized(4)),
    ]


def test_rows() -> None:
    ladder = _measure(_rungs())
    teacher, sixteen, four = ladder.rows
    assert (teacher.kl, teacher.top1, teacher.ratio) == (0.0, 1.0, 1.0)
    assert 0 < sixteen.kl < four.kl
    assert teacher.top1 > sixteen.top1 > four.top1
    assert sixteen.ratio == sixteen.perplexity / teacher.perplexity
    assert teacher.size.bits_per_weight == 16 > sixteen.size.bits_per_weight
    assert sixteen.size.bits_per_weight > four.size.bits_per_weight
    assert four.file_mb is None
    assert ladder.scored_tokens == 59
    assert ladder.row("four") is four
    assert [len(row.samples) for row in ladder.rows] == [2, 2, 2]


def test_measured_baked_equals_measured_as_it_is() -> None:
    ladder = _measure(_rungs()[:2])
    plain = perplexity(_quantized(16), _text().stream[:60], 16, 8)
    assert ladder.rows[1].perplexity == pytest.approx(plain, rel=1e-5)


def test_limits_choose_by_seed() -> None:
    text = _text()
    some = text.limited(_params())
    assert len(some.lengths) == 4
    assert len(some.stream) == 60
    assert all(any((row == known).all() for known in text.input_ids) for row in some.input_ids)
    other = text.limited(_params(seed=1))
    assert not np.array_equal(some.input_ids, other.input_ids)
    assert len(text.limited(_params(sequences=100)).lengths) == 9


def test_metrics_and_files_are_the_same_twice(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(3000))
    rungs = [*_rungs()[:2], Rung(name="four", load=lambda: _quantized(4), folder=folder)]
    for run in ("one", "two"):
        write_ladder(_measure(rungs), tmp_path / run, q4="sixteen", q2="four")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == sorted(FILES)
    for name in ("metrics.json", "samples.json", "ladder.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    values = json.loads((tmp_path / "one/metrics.json").read_text())["evaluate"]
    assert values["folder_mb"] == 0.003
    assert values["packed_mb"] == _measure(rungs).row("four").size.megabytes
    assert values["q4_ratio"] < values["q2_ratio"]
    ladder = json.loads((tmp_path / "one/ladder.json").read_text())
    assert [row["model"] for row in ladder["rows"]] == ["teacher", "sixteen", "four"]
    assert set(ladder["machine"]["peak_memory_mb"]) == {"teacher", "sixteen", "four"}
    assert "memory" not in json.dumps(values)
    samples = json.loads((tmp_path / "one/samples.json").read_text())
    assert samples["prompts"] == ["Hi", "What is 2+2?"]
    assert set(samples["answers"]) == {"teacher", "sixteen", "four"}


def test_markdown_has_a_row_per_model() -> None:
    lines = to_markdown(_measure(_rungs())).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["teacher", "sixteen", "four"]
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_a_model_of_nan_is_shown_not_hidden(tmp_path: Path) -> None:
    ladder = _measure([*_rungs()[:2], Rung(name="broken", load=_broken)], prompts=[])
    write_ladder(ladder, tmp_path, q4="sixteen", q2="broken")
    row = to_json(ladder)["rows"][2]
    assert row["perplexity"] is None
    assert row["kl"] is None
    assert metrics(ladder, q4="sixteen", q2="broken")["evaluate"]["q2_ppl"] is None
    assert "nan" in to_markdown(ladder)


def test_text_of_another_tokenizer_is_refused() -> None:
    text = _text()
    text.stream[5] = 288
    with pytest.raises(MismatchError, match="token 288"):
        measure_ladder(_rungs(), text, random_teacher("llama", seed=0)[1], _params(), CPU)


class FakeSuite:
    """Stands for `TaskSuite`: a score per task that falls with the model."""

    def __init__(self, names: tuple[str, ...], items: int, seed: int) -> None:
        self.names = names
        self.items = items
        assert seed == 0  # evaluate.seed
        self.seen: list[str] = []

    def measure(self, model: PreTrainedModel, tokenizer: Any, label: str) -> dict[str, Score]:
        assert not quantized_layers(model)  # baked, as for the other measurements
        self.seen.append(label)
        share = 1 / len(self.seen)
        error = math.nan if self.items == 1 else 0.02
        return {
            name: Score(
                items=self.items,
                of=1000,
                acc=0.25,
                acc_stderr=0.01,
                acc_norm=None if name == "boolq" else share,
                acc_norm_stderr=None if name == "boolq" else error,
            )
            for name in self.names
        }


def _measure_tasks(monkeypatch: pytest.MonkeyPatch, items: int) -> Ladder:
    monkeypatch.setattr(ladder_module, "TaskSuite", FakeSuite)
    return _measure(_rungs(), tasks=["piqa", "package:piqa", "boolq"], task_items=items)


def test_tasks_asked_for_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = _measure_tasks(monkeypatch, 50)
    values = metrics(ladder, q4="sixteen", q2="four")["evaluate"]
    assert [values[f"{row}_piqa"] for row in ("teacher", "q4", "q2")] == [1, 1 / 2, 1 / 3]
    assert values["q4_package_piqa"] == 1 / 2
    assert values["q4_boolq"] == 0.25
    assert to_json(ladder)["rows"][1]["tasks"]["piqa"] == {
        "items": 50,
        "of": 1000,
        "acc": 0.25,
        "acc_stderr": 0.01,
        "acc_norm": 0.5,
        "acc_norm_stderr": 0.02,
    }
    assert to_json(ladder)["rows"][1]["tasks"]["boolq"]["acc_norm"] is None
    assert to_json(ladder)["task_seed"] == 0
    lines = to_markdown(ladder).splitlines()
    assert lines[0].endswith("| piqa % | package:piqa % | boolq % |")
    assert lines[3].endswith("| 50.0 +- 2.0 | 50.0 +- 2.0 | 25.0 +- 1.0 |")
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "drawn with seed 0" in lines[-1]
    assert "package:piqa (50 of 1000 items, by length), boolq (50 of 1000 items)" in lines[-1]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the optional extra tasks is not installed (requirements-tasks.txt)",
)
def test_lm_eval_measures_every_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["ab", "hgf", "le", "ki", "mno", "rs", "tuv", "wx"]
    items = [Item(prompt=f"{word}:", choices=words, label=n) for n, word in enumerate(words)]
    monkeypatch.setattr("lib.evaluate.tasks.read_set", lambda name: items)
    ladder = _measure(_rungs(), tasks=["package:piqa"], task_items=6)
    tokenizer = random_teacher("llama", seed=0)[1]
    suite = TaskSuite(["package:piqa"], 6, 0)
    for row, load in zip(ladder.rows, (_teacher, lambda: _quantized(16)), strict=False):
        assert row.tasks == suite.measure(load(), tokenizer, row.name)
        assert row.tasks["package:piqa"].items == 6


def test_a_single_item_has_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = _measure_tasks(monkeypatch, 1)
    assert to_markdown(ladder).splitlines()[3].endswith("| 50.0 | 50.0 | 25.0 +- 1.0 |")
    assert to_json(ladder)["rows"][1]["tasks"]["piqa"]["acc_norm_stderr"] is None


def test_without_tasks_nothing_is_said_of_them() -> None:
    ladder = _measure(_rungs())
    assert "piqa" not in json.dumps(metrics(ladder, q4="sixteen", q2="four"))
    assert "task" not in json.dumps(to_json(ladder))
    assert "%" not in to_markdown(ladder)
    assert "Zero-shot" not in to_markdown(ladder)


def test_tasks_that_cannot_be_measured_stop_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    loaded: list[str] = []
    rungs = [Rung(name="teacher", load=lambda: loaded.append("teacher") or _teacher())]
    with pytest.raises(InputError, match="requirements-tasks.txt"):
        _measure(rungs, tasks=["package:piqa"])
    assert loaded == []
