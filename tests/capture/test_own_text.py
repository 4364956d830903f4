"""Text that the teacher writes: against one token after the other, and after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.base.errors import NonFiniteError
from lib.capture import own_text
from lib.capture.own_text import BATCH, CHOSEN, draw, write_rows
from lib.model.tiny import random_teacher
from tests.capture.writing import COUNT, LENGTH, SEED, writer, written

ROOT = Path(__file__).parents[2]
START = "<|endoftext|>"


def slow_row(model: torch.nn.Module, start: int, draws: np.ndarray, chosen: int) -> list[int]:
    """One sequence without a cache of keys and values, probabilities added up one by one."""
    tokens = [start]
    for place in range(1, len(draws)):
        logits = model(torch.tensor([tokens])).logits[0, -1, :259].double()
        shares = (logits - logits.max()).exp()
        shares /= shares.sum()
        token = int(shares.argmax())
        if place >= chosen:
            total = 0.0
            for token, share in enumerate(shares.tolist()):  # noqa: B007
                total += share
                if total > draws[place]:
                    break
        tokens.append(token)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("chosen", [1, 4])
def test_a_batch_is_its_sequences_one_by_one(chosen: int) -> None:
    model = random_teacher("qwen3", 1)[0].eval()
    generator = np.random.default_rng(0)
    start, draws = generator.integers(3, 259, 5), generator.random((5, 12))
    rows = write_rows(model, start, draws, chosen, 259)
    assert rows.dtype == np.int32 and rows.max() < 259
    for row, first, shares in zip(rows, start, draws, strict=True):
        assert row.tolist() == slow_row(model, int(first), shares, chosen)


def test_draws_follow_the_distribution() -> None:
    shares = torch.tensor([0.5, 0.0, 0.125, 0.375])
    at = (np.arange(800) + 0.5) / 800
    drawn = draw(shares.log().expand(800, 4), at)[:, 0]
    assert drawn.bincount(minlength=4).tolist() == [400, 0, 100, 300]
    assert draw(shares.log()[None], np.array([0.0])).tolist() == [[0]]
    assert draw(shares.roll(-1).log()[None], np.array([0.0])).tolist() == [[1]]  # never share 0


def test_a_sequence_depends_on_its_number_and_seed_alone(tmp_path: Path) -> None:
    everything = written(tmp_path / "one")
    assert len({tuple(row) for row in everything}) == COUNT
    assert {len(row) for row in everything} == {LENGTH}
    other = writer(tmp_path / "two")
    assert list(other(BATCH - 1, 3, LENGTH, SEED)) == everything[BATCH - 1 : BATCH + 2]
    assert list(other(0, 2, LENGTH, SEED)) == everything[:2]
    assert list(other(0, 2, LENGTH, SEED + 1)) != everything[:2]


def test_without_a_start_token_the_first_is_ordinary_and_the_next_are_the_likeliest(
    tmp_path: Path,
) -> None:
    model, tokenizer = random_teacher("llama", 0)
    special = {*tokenizer.all_special_ids}
    firsts = set()
    for row in written(tmp_path):
        assert row[0] not in special and row[0] < len(tokenizer)
        firsts.add(row[0])
        ranks = []
        for place in range(1, LENGTH):
            logits = model(torch.tensor([row[:place]])).logits[0, -1, : len(tokenizer)]
            ranks.append(int((logits > logits[row[place]]).sum()))
        assert not any(ranks[: CHOSEN - 1]) and any(ranks[CHOSEN - 1 :])
    assert len(firsts) > COUNT // 2


def test_with_a_start_token_all_begin_with_it_and_draw_at_once(tmp_path: Path) -> None:
    rows = written(tmp_path, START)
    assert {row[0] for row in rows} == {0}
    assert len({row[1] for row in rows}) > 5


def test_finished_batches_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(own_text, "write_rows", refuse)
    assert written(tmp_path) == first


def test_killed_and_resumed_is_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "tests.capture.writing", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.glob("*.npy") if path.name[0] != "."] == [
        f"{SEED}-{LENGTH}-0.npy"
    ]
    calls = []
    plain = own_text.write_rows

    def counted(*arguments: object) -> object:
        calls.append(1)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(own_text, "write_rows", counted)
    resumed = written(tmp_path)
    assert len(calls) == 2  # of three batches
    assert resumed == written(tmp_path / "never-stopped")


def test_a_teacher_that_is_no_number_is_refused() -> None:
    model = random_teacher("llama", 0)[0]
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="at token 1 of its own text"):
        write_rows(model, np.array([5]), np.full((1, 4), 0.5), 1, 259)
