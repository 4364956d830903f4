"""Figures are reproducible."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lib.base.figures import write_svg


def _figure(height: float) -> Figure:
    figure = Figure()
    figure.subplots().plot([0, height])
    return figure


def test_same_bytes_for_the_same_content(tmp_path: Path) -> None:
    for name, height in {"a": 1.0, "b": 1.0, "c": 2.0}.items():
        write_svg(tmp_path / f"{name}.svg", _figure(height))
    a, b, c = ((tmp_path / f"{name}.svg").read_bytes() for name in "abc")
    assert a == b != c
    assert b"<svg" in a
    assert len(list(tmp_path.iterdir())) == 3
