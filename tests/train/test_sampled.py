"""Training stages, folder to folder, on sampled targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.base.errors import MismatchError, ParamsError
from lib.params.data import Run
from lib.params.methods import Blockwise, Layerwise
from lib.params.training import Distill, Method, Rates
from lib.train.method import by_block
from lib.train.run import train_stage
from lib.train.state import Progress
from tests.tiny_models import make_place, model_spec
from tests.train.killing import killed_after
from tests.train.samples import config, start_of

SAMPLED: dict[str, Any] = {"targets": "sampled", "samples": 32, "sample_temperature": 2.0}
OUTPUTS = ("model/model.safetensors", "log.csv", "metrics.json")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``sampled`` and ``topk``, each with ``teacher`` and ``cache``."""
    root = tmp_path_factory.mktemp("places")
    make_place(root / "sampled", **SAMPLED)
    make_place(root / "topk")
    return root


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))


def stage(
    place: Path, out: Path, method: Method = "e2e", temperature: float = 2.0, **changes: Any
) -> Progress:
    teacher = place / "teacher"
    blocks = by_block(method, teacher, out / "scores.json", Layerwise(), Blockwise())
    return train_stage(
        "scales",
        start_of(teacher, model_spec(lut_size=4)),
        place / "cache",
        out,
        params=config(**{"hard_top1_weight": 0.0, **changes}),
        distill=Distill(temperature=temperature),
        run=Run(device="cpu", log_every=1),
        tokenizer_from=teacher,
        declared=f"{method} {temperature} {sorted(changes.items())}",
        by_block=blocks,
    )


def test_they_teach_and_the_top_k_of_held_out_text_judges(places: Path, tmp_path: Path) -> None:
    rates = Rates(scale_direction=1e-3, scale_magnitude=1e-3)
    drawn, top = (
        stage(places / name, tmp_path / name, steps=12, rates=rates) for name in ("sampled", "topk")
    )
    assert drawn.initial_loss == top.initial_loss
    assert drawn.best_loss < 0.99 * drawn.initial_loss
    assert [row["kd_loss"] for row in drawn.rows[1:]] != [row["kd_loss"] for row in top.rows[1:]]


@pytest.mark.parametrize("method", ["e2e", "layerwise"])
def test_resumes_bit_for_bit(places: Path, tmp_path: Path, method: Method) -> None:
    settings: dict[str, Any] = {"method": method, "hard_full_weight": 0.01, "ema": 0.9}
    stage(places / "sampled", tmp_path / "whole", **settings)
    with killed_after(3):
        stage(places / "sampled", tmp_path / "parts", **settings)
    with killed_after(5) as begun:
        stage(places / "sampled", tmp_path / "parts", **settings)
    assert begun[0] == 2  # it goes on where it was saved
    stage(places / "sampled", tmp_path / "parts", **settings)
    for name in OUTPUTS:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_blocks_learn_beside_them(places: Path, tmp_path: Path) -> None:
    """Blocks learn from hidden states; the targets of the training text are not read."""
    found = [
        stage(places / name, tmp_path / name, "blockwise").best_loss for name in ("sampled", "topk")
    ]
    assert found[0] == found[1]


def test_another_temperature_is_refused(places: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"drawn at temperature 2.0.*is 1.5"):
        stage(places / "sampled", tmp_path, temperature=1.5)
    assert not (tmp_path / "model").exists()


def test_candidates_are_refused(places: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"hard_top1_weight = 0.1.*cache.targets to topk"):
        stage(places / "sampled", tmp_path, hard_top1_weight=0.1)
