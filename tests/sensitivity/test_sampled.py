"""Scores from sampled targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.base.errors import MismatchError
from lib.params.data import Run
from lib.params.sensitivity import Sensitivity
from lib.params.training import Distill
from lib.sensitivity.run import sensitivity_stage
from tests.tiny_models import VOCAB, make_place, model_spec
from tests.train.samples import save_start


def stage(place: Path, out: Path, temperature: float = 2.0, **section: Any) -> dict[str, float]:
    save_start(place / "teacher", model_spec(lut_size=4), place / "quantized")
    return sensitivity_stage(
        place / "teacher",
        place / "quantized",
        place / "cache",
        out,
        params=Sensitivity(**section),
        distill=Distill(temperature=temperature),
        run=Run(device="cpu"),
    )


def test_fisher_scores_of_every_token_are_those_of_the_full_loss(tmp_path: Path) -> None:
    """Few draws add the variance of what was drawn, so their scores are larger."""
    top = make_place(tmp_path / "top", top_k=VOCAB, negatives=0)
    wanted = stage(top, tmp_path / "a")
    ratios = {}
    for samples in (8, VOCAB):
        place = make_place(tmp_path / str(samples), targets="sampled", samples=samples)
        found = stage(place, tmp_path / "b")
        assert found.keys() == wanted.keys()
        ratios[samples] = np.array([found[name] / wanted[name] for name in wanted])
    assert np.allclose(ratios[VOCAB], 1, atol=0.02)
    assert np.median(ratios[8]) > 1.02


def test_perturbation_asks_held_out_text_alone(tmp_path: Path) -> None:
    top = make_place(tmp_path / "top")
    sampled = make_place(tmp_path / "sampled", targets="sampled", samples=8)
    settings: dict[str, Any] = {"method": "perturbation", "sequences": 4}
    assert stage(top, tmp_path / "a", **settings) == stage(sampled, tmp_path / "b", **settings)


def test_another_temperature_is_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path / "place", targets="sampled", samples=8)
    with pytest.raises(MismatchError, match=r"drawn at temperature 2.0.*is 1.0"):
        stage(place, tmp_path / "out", temperature=1.0)
