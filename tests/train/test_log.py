"""What is written and said while a run goes on."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lib.base.errors import InputError
from lib.params.data import Run
from lib.train.log import logged_rows, reporting, result_of, write_log
from lib.train.state import Progress


def progress(steps: int = 5) -> Progress:
    rows: list[dict[str, float | int | None]] = [{"step": 0, "val_kd_loss": 2.0}]
    for step in range(1, steps + 1):
        row: dict[str, float | int | None] = {"step": step, "loss": 1.0 / step, "kd_loss": 0.5}
        if step == 3:
            row["val_kd_loss"] = 1.5
        rows.append(row)
    return Progress(
        step=steps, initial_loss=2.0, best_loss=1.5, best_step=3, last_loss=1.6, rows=rows
    )


def test_every_nth_row_and_all_that_were_evaluated() -> None:
    assert [row["step"] for row in logged_rows(progress(), 2)] == [0, 2, 3, 4]
    assert [row["step"] for row in logged_rows(progress(), 100)] == [0, 3]


def test_log_and_metrics_on_disk(tmp_path: Path) -> None:
    write_log(tmp_path, "scales", progress(), 2)
    with (tmp_path / "log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["0", "2", "3", "4"]
    assert table[2]["val_kd_loss"] == "1.5" and table[0]["loss"] == ""
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == {"scales": result_of(progress())}
    assert metrics["scales"] == {
        "initial_kd": 2.0,
        "best_kd": 1.5,
        "final_kd": 1.6,
        "best_step": 3,
        "steps": 5,
    }
    write_log(tmp_path, "scales", progress(), 2, {"hit_rate": 0.5})
    kept = json.loads((tmp_path / "metrics.json").read_text())["scales"]
    assert kept == {**result_of(progress()), "hit_rate": 0.5}


def test_reports_are_short_lines_and_metrics_appear_when_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporting("scales", 5, tmp_path, Run(log_every=2), {}, tokens_per_step=100) as report:
        for steps in range(1, 6):
            now = progress(steps)
            report(now)
            assert (tmp_path / "metrics.json").exists() is (steps >= 3)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["scales 2/5", "scales 4/5", "scales 5/5"]
    assert "loss 0.5000, held-out 1.6000" in lines[0] and lines[0].endswith("tokens/s")
    assert captured.out == ""


def test_wandb_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    with (
        pytest.raises(InputError, match=r"run\.wandb is 'mine' .*not installed.*null") as caught,
        reporting("scales", 5, tmp_path, Run(wandb="mine"), {}, tokens_per_step=10),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fails", [False, True])
def test_wandb_gets_logged_rows_and_is_always_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    calls: list[Any] = []

    class Tracker:
        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    def init(**options: Any) -> Tracker:
        calls.append(options)
        return Tracker()

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    try:
        run = Run(wandb="mine", log_every=2)
        with reporting("scales", 5, tmp_path, run, {"x": 1}, tokens_per_step=10) as report:
            for steps in (1, 2):
                report(progress(steps))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert calls == [
        {"project": "mine", "name": "scales", "config": {"x": 1}},
        (2, {"step": 2, "loss": 0.5, "kd_loss": 0.5}),
        "finish",
    ]
