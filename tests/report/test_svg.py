"""Charts: where marks stand, what is left out, ticks."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from lib.report.svg import Bar, Series, bars, heat, plot


def points(svg: str) -> list[tuple[float, float]]:
    """Centres of the dots."""
    return [
        (float(node.attrib["cx"]), float(node.attrib["cy"]))
        for node in ElementTree.fromstring(svg).iter("circle")
    ]


def draw(values: list[float], **options: object) -> str:
    series = Series(name="s", points=list(enumerate(values)))
    return str(plot([series], "label", x_label="x", y_label="y", **options))  # type: ignore[arg-type]


def test_places_are_proportional() -> None:
    (x0, y0), (x1, y1), (x2, y2) = points(draw([1.0, 2.0, 3.0]))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y1 > y2  # more is higher


def test_logarithmic_places() -> None:
    (_, y0), (_, y1), (_, y2) = points(draw([0.01, 1.0, 100.0], log=True))
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert len(points(draw([0.0, -1.0, 1.0], log=True))) == 1


@pytest.mark.parametrize(
    "values", [[], [1.0], [0.0, 0.0], [math.nan], [1e-300, 1e300], [-5.0, 5.0]]
)
@pytest.mark.parametrize("log", [False, True])
def test_any_values_give_a_chart(values: list[float], log: bool) -> None:
    svg = draw(values, log=log, limit=1.0)
    numbers = re.findall(r'(?:cx|cy|x1|x2|y1|y2)="([^"]*)"', svg)
    assert numbers
    assert all(math.isfinite(float(number)) for number in numbers)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 10.0], ["0", "5", "10"]), ([0.1, 0.3], ["0.10", "0.15", "0.20"])],
)
def test_ticks_are_round(values: list[float], expected: list[str]) -> None:
    texts = re.findall(r'text-anchor="end">([^<]*)<', draw(values))
    assert texts[: len(expected)] == expected


def test_ticks_of_a_logarithm_are_powers() -> None:
    texts = re.findall(r'text-anchor="end">([^<]*)<', draw([1e-5, 1e3], log=True))
    assert "10⁻⁴" in texts and "100" in texts


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar(label="a", value=1.0, text="1"), Bar(label="b", value=2.0, text="2")]
    rows.append(Bar(label="c", value=None, text="none"))
    found = ElementTree.fromstring(str(bars(rows, "label"))).iter("rect")
    one, two, none = (float(node.attrib["width"]) for node in found)
    assert two == pytest.approx(2 * one, abs=0.11)
    assert none == 0


def test_a_cell_is_darker_for_more() -> None:
    svg = str(heat({"q": {0: 1e-6, 1: 1e-3}, "k": {1: 1.0, 2: math.nan}}, "label", unit=""))
    cells = [n for n in ElementTree.fromstring(svg).iter("rect") if len(n)]
    shades = [float(cell.attrib["fill-opacity"]) for cell in cells]
    assert shades == [0.08, 0.54, 1.0]
    assert cells[0][0].text == "q, block 0: 1e-06"


def test_colours_come_from_the_page() -> None:
    svg = draw([1.0, 2.0]) + str(bars([Bar(label="a", value=1.0, text="1")], "b"))
    assert "fill=" not in svg and "stroke=" not in svg and "#" not in svg
