"""Training from the teacher itself, folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.base.errors import MismatchError
from lib.model.load import tokenizer_fingerprint
from lib.params.data import Run
from lib.params.training import Distill
from lib.text.sequences import write_tokens
from lib.train.run import Start, train_stage
from lib.train.source import LiveTeacher, live_teacher
from lib.train.state import Progress
from tests.tiny_models import CPU, VOCAB, make_place, model_spec, random_rows
from tests.train.killing import killed_after
from tests.train.samples import config, start_of

LIVE = Distill(source="teacher")


def write_rows(folder: Path, seed: int, tokenizer: str) -> Path:
    rows = random_rows(24, "train", seed)
    about = {"split": "train", "vocab_size": VOCAB, "pad_id": 0, "tokenizer": tokenizer}
    write_tokens(folder / "train", rows.input_ids, rows.lengths, **about)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher``, ``cache`` and ``tokens``."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    write_rows(folder / "tokens", 9, tokenizer_fingerprint(folder / "teacher"))
    return folder


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))


def stage(place: Path, out: Path, distill: Distill = LIVE, **changes: Any) -> Progress:
    return train_stage(
        "scales",
        start_of(place / "teacher", model_spec(lut_size=4)),
        place / "cache",
        out,
        params=config(**{"steps": 6, "hard_top1_weight": 0.0, **changes}),
        distill=distill,
        run=Run(device="cpu", log_every=1),
        tokenizer_from=place / "teacher",
        declared="x",
        live=live_teacher(distill, place / "teacher", place / "tokens"),
    )


def test_the_teacher_teaches_and_the_cache_judges(place: Path, tmp_path: Path) -> None:
    live = stage(place, tmp_path / "live")
    cached = stage(place, tmp_path / "cached", Distill())
    assert live.initial_loss == cached.initial_loss  # both from the cached held-out text
    assert live.best_loss < live.initial_loss
    assert [row["kd_loss"] for row in live.rows[1:]] != [row["kd_loss"] for row in cached.rows[1:]]


def test_resumes_bit_for_bit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(place, tmp_path / "whole", checkpoint_every=2)
    with killed_after(3):
        stage(place, tmp_path / "parts", checkpoint_every=2)
    stage(place, tmp_path / "parts", checkpoint_every=2)
    assert "going on after step 2" in capsys.readouterr().err
    for name in ("model/model.safetensors", "log.csv", "metrics.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_text_of_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    tokens = write_rows(tmp_path / "tokens", 9, "another")
    start: Start = start_of(place / "teacher", model_spec(lut_size=4))
    live = LiveTeacher(teacher=place / "teacher", tokens=tokens)
    with pytest.raises(MismatchError, match="tokenizer another.*rerun the tokens stage"):
        live.identity(start.teacher)
    with pytest.raises(MismatchError, match="not the teacher that the model comes from"):
        live.identity("another")


def test_other_text_is_another_run(place: Path, tmp_path: Path) -> None:
    mark = tokenizer_fingerprint(place / "teacher")
    marks = set()
    for seed in (1, 2):
        tokens = write_rows(tmp_path / str(seed), seed, mark)
        live = LiveTeacher(teacher=place / "teacher", tokens=tokens)
        start = start_of(place / "teacher", model_spec(lut_size=4))
        marks.add(live.identity(start.teacher)["text"])
    assert len(marks) == 2


def test_every_row_is_seen(place: Path) -> None:
    live = LiveTeacher(teacher=place / "teacher", tokens=place / "tokens")
    held_out: Any = None
    _, batches = live.load(config(), LIVE, held_out, CPU)
    assert len(batches) == 24
    assert batches.batch(np.arange(24)).input_ids.shape[0] == 24
