"""The colours of both themes can be told apart, also by eyes that see little contrast (WCAG 2)."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import lib.report.page

FOLDER = Path(lib.report.page.__file__).parent
TONES = [f"t{number}" for number in range(8)]


def themes(name: str) -> list[dict[str, str]]:
    """Variables of each ``:root`` block of a file that sets colours."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in blocks]


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_wcag_s() -> None:
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize(("name", "count"), [("page.css", 3), ("plots.html", 2)])
def test_every_theme_is_legible(name: str, count: int) -> None:
    found = themes(name)
    assert len(found) == count
    assert all(set(theme) == set(found[0]) for theme in found)
    for theme in found:
        words = {"text", "muted", "accent", "good", "bad", "warn", *TONES} & set(theme)
        for word, ground in itertools.product(sorted(words), ("page", "surface")):
            assert contrast(theme[word], theme[ground]) >= 4.5, (word, ground, theme)


def test_dark_is_dark() -> None:
    light, dark, paper = themes("page.css")
    assert luminance(light["page"]) > 0.8 and luminance(paper["page"]) > 0.8
    assert luminance(dark["page"]) < 0.05
