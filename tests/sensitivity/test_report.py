"""The stage's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.base.errors import MismatchError
from lib.model.scores import read_scores
from lib.sensitivity.report import draw_scores, metrics, write_report
from tests.architecture import load_yaml, outputs_of

ROOT = Path(__file__).parents[2]
SCORES = {
    "model.layers.0.self_attn.q_proj": 1e-6,
    "model.layers.0.mlp.up_proj": 3e-6,
    "model.layers.1.self_attn.q_proj": 1e-4,
    "model.layers.1.mlp.up_proj": 3e-4,
    "model.layers.2.mlp.up_proj": 5e-5,
}
BLOCKS = [2e-6, 2e-4, 5e-5]


def test_files_are_the_same_twice_and_read_back(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_report(SCORES, 3, "fisher", tmp_path / folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert json.loads((tmp_path / "one/scores.json").read_text()) == SCORES
    assert read_scores(tmp_path / "one/scores.json") == SCORES
    values = json.loads((tmp_path / "one/metrics.json").read_text())["sensitivity"]
    assert values == {
        "most_sensitive": 1,
        "highest": pytest.approx(2e-4),
        "median": pytest.approx(5e-5),
        "lowest": pytest.approx(2e-6),
    }


def test_the_pipeline_declares_every_file(tmp_path: Path) -> None:
    """An output that dvc.yaml does not list is left stale."""
    write_report(SCORES, 3, "fisher", tmp_path)
    stage = load_yaml(ROOT / "dvc.yaml")["stages"]["sensitivity"]
    written = {f"runs/sensitivity/{path.name}" for path in tmp_path.iterdir()}
    assert written == set(outputs_of(stage))


def test_scores_of_too_few_blocks_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="decoder block 3 of 4 has no score"):
        write_report(SCORES, 4, "fisher", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_figure_has_a_bar_per_block_and_a_line_per_kind() -> None:
    (axes,) = draw_scores(SCORES, BLOCKS, "fisher").axes
    assert [bar.get_height() for bar in axes.patches] == BLOCKS
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == {"q_proj", "up_proj"}
    assert list(lines["q_proj"].get_xdata()) == [0, 1]
    assert list(lines["up_proj"].get_ydata()) == [3e-6, 3e-4, 5e-5]
    assert axes.get_yscale() == "log"
    assert "gradient" in axes.get_ylabel()


def test_scores_of_blocks_alone_have_no_lines() -> None:
    (axes,) = draw_scores({f"model.layers.{i}": BLOCKS[i] for i in range(3)}, BLOCKS, "file").axes
    assert len(axes.patches) == 3 and not axes.lines


@pytest.mark.parametrize(
    ("blocks", "scale"), [([1e-3, -1e-5], "symlog"), ([0.0, 2.0], "symlog"), ([0.0, 0.0], "linear")]
)
def test_a_score_that_has_no_logarithm_is_shown_too(
    tmp_path: Path, blocks: list[float], scale: str
) -> None:
    scores = {f"model.layers.{i}": value for i, value in enumerate(blocks)}
    (axes,) = draw_scores(scores, blocks, "perturbation").axes
    assert axes.get_yscale() == scale
    write_report(scores, 2, "perturbation", tmp_path)


def test_equal_scores_name_the_first_block() -> None:
    assert metrics([1.0, 1.0])["sensitivity"]["most_sensitive"] == 0
