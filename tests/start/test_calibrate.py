"""Stage calibrate from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.model import calibrate
from lib.model.calibrate import MomentSums, input_moments
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.model.moments import StoredMoments
from lib.params.data import Run
from lib.quant.spec import Moments
from lib.start.calibrate import MOMENTS, calibrate_stage
from lib.text.sequences import TokenSet
from tests.start.place import ROWS, make_place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    return make_place(tmp_path)


def stage(place: Path, out: Path, needed: Moments, sequences: int = 20) -> dict[str, Any]:
    teacher, tokens, run = place / "teacher", place / "train", Run(device="cpu")
    return calibrate_stage(teacher, tokens, out, sequences=sequences, needed=needed, run=run)


@pytest.mark.parametrize("needed", [Moments.SQUARES, Moments.PRODUCTS])
def test_writes_what_the_teacher_does_on_the_first_rows(
    place: Path, tmp_path: Path, needed: Moments
) -> None:
    metrics = stage(place, tmp_path / "out", needed)
    full = needed is Moments.PRODUCTS
    kept = StoredMoments(
        tmp_path / "out" / MOMENTS, teacher=folder_fingerprint(place / "teacher"), full=full
    )
    rows = TokenSet(place / "train").first(20)
    ids, lengths = torch.tensor(rows.input_ids).long(), torch.tensor(rows.lengths)
    wanted = input_moments(load_causal_lm(place / "teacher"), ids, lengths, full=full)
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert kept.info["tokens"] == rows.meta["fingerprint"]
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written == {"calibrate": metrics}
    assert (metrics["sequences"], metrics["tokens"]) == (20, int(rows.lengths.sum()))


def test_all_rows_where_there_are_fewer(place: Path, tmp_path: Path) -> None:
    assert stage(place, tmp_path / "out", Moments.SQUARES, 1000)["sequences"] == ROWS


def test_the_teacher_rests_where_nothing_is_needed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.start.calibrate.load_causal_lm", None)
    metrics = stage(place, tmp_path / "out", Moments.NONE)
    assert (metrics["moments"], metrics["sequences"]) == ("none", 0)
    mark = folder_fingerprint(place / "teacher")
    assert list(StoredMoments(tmp_path / "out" / MOMENTS, teacher=mark, full=False)) == []


@pytest.mark.parametrize("needed", [Moments.SQUARES, Moments.PRODUCTS])
def test_a_killed_run_resumes_to_the_same_bytes(
    place: Path, tmp_path: Path, needed: Moments, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(place, tmp_path / "whole", needed)
    monkeypatch.setattr(calibrate, "SAVE_SECONDS", 0.0)
    kept, resumed = MomentSums.save, []

    def save_and_die(self: MomentSums, file: Path, batches: int) -> None:
        kept(self, file, batches)
        if batches == 2:
            raise KeyboardInterrupt

    def note(self: MomentSums, file: Path, batches: int) -> None:
        resumed.append(batches)
        kept(self, file, batches)

    monkeypatch.setattr(MomentSums, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        stage(place, tmp_path / "parts", needed)
    monkeypatch.setattr(MomentSums, "save", note)
    stage(place, tmp_path / "parts", needed)
    assert resumed == [3]  # of three batches only the last
    for name in (MOMENTS, "metrics.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "root/.ckpt/calibrate").glob("*/"))
