"""Scores from a file: the published form, ours, and everything that is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib.base.errors import InputError, LutqatError, MismatchError
from lib.sensitivity.given import block_names, given_scores
from tests.tiny_models import FAMILIES, quantized, tiny_model

PUBLISHED: dict[str, Any] = {
    "model": {"name": "tiny", "num_layers": 2, "hidden_size": 32},
    "method": "fisher",
    "sensitivity_scores": [0.5, 2],
    "ranked_layers": [1, 0],
    "statistics": {"mean": 1.25, "max": 2.0},
}
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"


def given_(folder: Path, values: Any) -> dict[str, float]:
    path = folder / "given.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return given_scores(path, tiny_model())


def test_the_published_form_gives_blocks(tmp_path: Path) -> None:
    wanted = {"model.layers.0": 0.5, "model.layers.1": 2.0}
    assert given_(tmp_path, PUBLISHED) == wanted
    assert given_(tmp_path, {"sensitivity_scores": [0.5, 2]}) == wanted
    assert given_(tmp_path, {**PUBLISHED, "model": {"name": "tiny"}}) == wanted
    assert given_(tmp_path, {**PUBLISHED, "model": "tiny"}) == wanted


@pytest.mark.parametrize("scores", [{UP: 1.0, Q: -2.0}, {"model.layers.1": 3.0, UP: 4.0}])
def test_our_own_form_is_taken_as_it_is(tmp_path: Path, scores: dict[str, float]) -> None:
    found = given_(tmp_path, scores)
    assert found == scores and list(found) == list(scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_have_the_models_names(family: str) -> None:
    for model in (tiny_model(family), quantized(family)):
        assert block_names(model) == ["model.layers.0", "model.layers.1"]


REFUSED: list[tuple[Any, type[LutqatError], str]] = [
    ("{", InputError, "is not JSON; mend it"),
    ("", InputError, "is not JSON"),
    ([0.5, 2.0], InputError, "has no key sensitivity_scores"),
    ({"method": "fisher", "scores": [0.5, 2.0]}, InputError, "has no key sensitivity_scores"),
    ({}, InputError, "has no key sensitivity_scores"),
    ({"sensitivity_scores": {"0": 1.0}}, InputError, "sensitivity_scores is not a list"),
    ({"sensitivity_scores": [0.5, "2"]}, InputError, "sensitivity_scores[1] is '2', not a number"),
    ({"sensitivity_scores": [True, 2.0]}, InputError, "sensitivity_scores[0] is True, not a"),
    ({"sensitivity_scores": [0.5, None]}, InputError, "sensitivity_scores[1] is None"),
    ({"sensitivity_scores": [[0.5], 2]}, InputError, "sensitivity_scores[0] is [0.5]"),
    ('{"sensitivity_scores": [0.5, NaN]}', InputError, "sensitivity_scores[1] is nan"),
    ('{"sensitivity_scores": [-Infinity, 1]}', InputError, "sensitivity_scores[0] is -inf"),
    ({"sensitivity_scores": [0.5]}, MismatchError, "length of sensitivity_scores is 1, but the"),
    ({"sensitivity_scores": [1, 2, 3]}, MismatchError, "is 3, but the teacher has 2 decoder"),
    ({**PUBLISHED, "model": {"num_layers": 32}}, MismatchError, "model.num_layers is 32, but"),
    ({**PUBLISHED, "model": {"num_layers": "2"}}, MismatchError, "model.num_layers is 2"),
    ({UP: 1.0}, MismatchError, "decoder block 1 of 2 has no score"),
    ({UP: 1.0, Q: "a"}, InputError, f"the score of {Q} is 'a'"),
    ({UP: 1.0, "model.layers.1.mlp.fc1": 1.0}, MismatchError, "model.layers.1.mlp.fc1, which"),
    ({UP: 1.0, Q: 1.0, "model.layers.2": 1.0}, MismatchError, "model.layers.2, which this model"),
    ({UP: 1.0, "model.layers.x": 1.0}, InputError, "is not inside a decoder block"),
]


@pytest.mark.parametrize(("values", "error", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_anything_else_is_refused_in_one_line(
    tmp_path: Path, values: Any, error: type[LutqatError], words: str
) -> None:
    with pytest.raises(error) as caught:
        given_(tmp_path, values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(InputError, match="is not a file here; give a path"):
            given_scores(path, tiny_model())
