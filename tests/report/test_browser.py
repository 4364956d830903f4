"""The page in a real browser: both themes, narrow and wide, and nothing asked of any network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.report.experiment import read_experiment
from lib.report.page import render
from lib.report.source import workspace
from tests.report.browser import NO_BROWSER, PROGRAM, Browser, browser
from tests.report.runs import write_runs

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=NO_BROWSER)

OUTSIDE = """[...document.querySelectorAll("svg text")].filter((text) => {
  const box = text.getBoundingClientRect();
  const chart = text.closest("svg").getBoundingClientRect();
  return box.left < chart.left - 1 || box.right > chart.right + 1
      || box.top < chart.top - 1 || box.bottom > chart.bottom + 1;
}).map((text) => text.textContent)"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one experiment, and of two."""
    folder = tmp_path_factory.mktemp("pages")
    this = read_experiment(workspace(write_runs(folder / "this")))
    other = read_experiment(workspace(write_runs(folder / "other", best=2.0, snapped=30.5)))
    other.name = "a-name-that-is-rather-long"
    texts = {"one": render(this), "two": render(this, other)}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_is_wider_than_the_window(
    tab: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    tab.open(pages[name], width=width)
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(OUTSIDE) == []


def test_light_and_dark(tab: Browser, pages: dict[str, Path]) -> None:
    seen = {}
    for dark in (False, True):
        tab.open(pages["one"], width=1400, dark=dark)
        picture = tab.picture()
        assert picture.size[0] == 1400 and picture.size[1] > 2000
        colours = picture.getcolors(picture.size[0] * picture.size[1])
        assert colours is not None and len(colours) > 100  # letters and charts, not one surface
        seen[dark] = [sum(picture.getpixel((2, y))) / 3 for y in (2, picture.size[1] - 3)]
        chart = tab.value("getComputedStyle(document.querySelector('svg text')).fill")
        seen[dark].append(sum(map(int, chart.strip("rgb()").split(","))) / 3)
    assert min(seen[False][:2]) > 220 and seen[False][2] < 120
    assert max(seen[True][:2]) < 40 and seen[True][2] > 140


def test_no_request_leaves_the_page(tab: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    for page in pages.values():
        tab.open(page)
        assert tab.requests() == [page.as_uri()]
        assert tab.complaints() == []
    control = tmp_path / "control.html"
    control.write_text('<img src="http://127.0.0.1:9/x.png">', encoding="utf-8")
    tab.open(control)
    assert "http://127.0.0.1:9/x.png" in tab.requests()


def test_folds_open_and_anchors_lead_somewhere(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["one"])
    assert tab.value("document.querySelectorAll('details').length") > 3
    lost = "[...document.links].filter((a) => !document.querySelector(a.hash)).length"
    assert tab.value(lost) == 0
