"""Reading sensitivity scores, and their means over blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.base.errors import CorruptError, InputError, LutqatError, MismatchError
from lib.base.files import write_json
from lib.model.scores import block_scores, read_scores

LAYERS = {
    "model.layers.1.mlp.up_proj": 4.0,
    "model.layers.0.mlp.up_proj": 1.0,
    "model.layers.0.self_attn.q_proj": 2.0,
}
UP = "model.layers.0.mlp.up_proj"


def test_what_was_written_is_read_in_its_order(tmp_path: Path) -> None:
    write_json(tmp_path / "scores.json", LAYERS)
    found = read_scores(tmp_path / "scores.json")
    assert found == LAYERS and list(found) == list(LAYERS)
    write_json(tmp_path / "blocks.json", {"model.layers.0": 1, "model.layers.1": -2})
    assert read_scores(tmp_path / "blocks.json") == {"model.layers.0": 1.0, "model.layers.1": -2.0}


def test_a_block_has_the_mean_of_its_layers() -> None:
    assert block_scores(LAYERS, 2) == [1.5, 4.0]
    eleven = {"m.layers.10": 3.0, **{f"m.layers.{i}": float(i) for i in range(10)}}
    assert block_scores(eleven, 11) == [*range(10), 3.0]


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (3, "decoder block 2 of 3 has no score"),
        (1, r"score of model\.layers\.1\.mlp\.up_proj, but the model has 1 decoder blocks"),
    ],
)
def test_scores_of_another_model_are_refused(blocks: int, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        block_scores(LAYERS, blocks)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("{", CorruptError, "not valid JSON"),
        ("[1, 2]", InputError, "holds no scores by layer name"),
        ("{}", InputError, "holds no scores by layer name"),
        ('{"lm_head": 1}', InputError, "lm_head. is not inside a decoder block"),
        (json.dumps({UP: "3"}), InputError, f"the score of {UP} is '3', not a number"),
        (json.dumps({UP: True}), InputError, f"the score of {UP} is True, not a number"),
        (json.dumps({UP: None}), InputError, f"the score of {UP} is None, not a number"),
        (json.dumps({UP: float("nan")}), InputError, f"the score of {UP} is nan"),
        (json.dumps({UP: -float("inf")}), InputError, f"the score of {UP} is -inf"),
        ('{"' + UP + '": 1' + "0" * 400 + "}", InputError, f"the score of {UP} is inf"),
    ],
)
def test_bad_files_give_one_line(
    tmp_path: Path, text: str, error: type[LutqatError], words: str
) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(error) as caught:
        read_scores(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json does not exist; run the stage"):
        read_scores(tmp_path / "absent.json")
