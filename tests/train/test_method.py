"""From a section's method to what trains: the right teacher, the right epochs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.base.errors import InputError, MismatchError
from lib.model.load import folder_fingerprint
from lib.objective.distillation import make_objective
from lib.params.methods import Blockwise, Layerwise
from lib.params.training import Method
from lib.train.blockwise import BlockwiseMethod
from lib.train.by_block import BlockMethod, Task
from lib.train.layerwise import LayerwiseMethod
from lib.train.method import ByBlock, by_block
from tests.tiny_models import CPU, make_caches, quantized, readers, tiny_model
from tests.train.samples import config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, train/ and val/ of its cache, and scores.json."""
    folder = tmp_path_factory.mktemp("method")
    tiny_model().save_pretrained(folder / "teacher")
    make_caches(folder, rows=16)
    scores = {"model.layers.0.mlp.up_proj": 3.0, "model.layers.0": 5.0, "model.layers.1": 2.0}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def chosen(place: Path, method: Method, **blockwise: float) -> ByBlock:
    made = by_block(
        method, place / "teacher", place / "scores.json", Layerwise(), Blockwise(**blockwise)
    )
    assert made is not None
    return made


def make(place: Path, tmp_path: Path, method: Method, **blockwise: float) -> BlockMethod:
    train, val = readers(place)
    objective = make_objective(train, temperature=2.0, target="candidates")
    task = Task(quantized(), config(), objective, train, val, CPU, tmp_path)
    return chosen(place, method, **blockwise).make(task)


def test_end_to_end_is_none(place: Path) -> None:
    assert by_block("e2e", place, place, Layerwise(), Blockwise()) is None


def test_each_method_is_what_it_is_called(place: Path, tmp_path: Path) -> None:
    assert isinstance(make(place, tmp_path / "a", "layerwise"), LayerwiseMethod)
    assert isinstance(make(place, tmp_path / "b", "blockwise"), BlockwiseMethod)


def test_adaptive_epochs_come_from_the_scores(place: Path, tmp_path: Path) -> None:
    even = make(place, tmp_path / "a", "blockwise", epochs=4.0)
    assert [even.steps(block) for block in (0, 1)] == [8, 8]  # 16 sequences, 8 a step
    more = make(place, tmp_path / "b", "blockwise", epochs=4.0, adaptive=0.25)
    assert [more.steps(block) for block in (0, 1)] == [10, 8]
    few = make(place, tmp_path / "c", "blockwise", epochs=4.0, sequences=8)
    assert [few.steps(block) for block in (0, 1)] == [4, 4]


def test_scores_are_part_of_what_defines_a_run_only_where_they_count(place: Path) -> None:
    mark = folder_fingerprint(place / "teacher")
    assert chosen(place, "blockwise").identity(mark) == {}
    assert chosen(place, "blockwise", adaptive=0.25).identity(mark)["scores"]


def test_refusals(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="is not the teacher that the model comes from"):
        chosen(place, "layerwise").identity("another")
    missing = ByBlock(
        method="blockwise",
        teacher=place / "teacher",
        scores=tmp_path / "none.json",
        layerwise=Layerwise(),
        blockwise=Blockwise(adaptive=0.1),
    )
    with pytest.raises(InputError, match=r"none\.json"):
        missing.identity(folder_fingerprint(place / "teacher"))
