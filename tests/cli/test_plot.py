"""plot."""

from __future__ import annotations

from pathlib import Path

from lib.train.state import rows_to_csv
from tests.cli.run import lutqat


def write_log(folder: Path, start: float) -> None:
    folder.mkdir(parents=True)
    rows: list[dict[str, float | int | None]] = [{"step": 0, "val_kd_loss": start}]
    rows += [{"step": n, "loss": start / n, "kd_loss": start / n} for n in range(1, 6)]
    rows[-1]["val_kd_loss"] = start / 2
    (folder / "log.csv").write_text(rows_to_csv(rows))


def test_curves_as_svg(tmp_path: Path) -> None:
    write_log(tmp_path / "scales", 2.0)
    write_log(tmp_path / "weights", 1.0)
    runs = [tmp_path / "scales", tmp_path / "weights" / "log.csv"]
    outcome = lutqat("plot", *runs, "--out", tmp_path / "one.svg")
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "one.svg").read_text()
    assert text.lstrip().startswith("<?xml") and text.rstrip().endswith("</svg>")
    for name in ("scales, held out", "weights, held out", "distillation loss"):
        assert f"<!-- {name} -->" in text
    lutqat("plot", *runs, "--out", tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text() == text
    lutqat("plot", *runs, "--log", "--out", tmp_path / "log.svg")
    assert (tmp_path / "log.svg").read_text() != text


def test_bad_requests(tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    lutqat("plot", tmp_path / "none", "--out", out).refused_with(3, "does not exist")
    for number, (text, code) in enumerate((("a,b\n1,2\n", 5), ("step,kd_loss,val_kd_loss\n", 3))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "log.csv").write_text(text)
        lutqat("plot", folder, "--out", out).refused_with(code, "log.csv")
    assert not out.exists()
