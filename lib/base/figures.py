"""Figures as files that are the same bytes for the same content."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lib.base.files import atomic_file


def write_svg(path: Path, figure: Figure) -> None:
    """Save ``figure`` as SVG, atomically, without a date and with reproducible ids."""
    with matplotlib.rc_context({"svg.hashsalt": "lutqat"}), atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None}, bbox_inches="tight")
