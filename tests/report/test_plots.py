"""`dvc plots` without network: the repository's own page draws the curves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.report.browser import NO_BROWSER, PROGRAM, browser
from tests.report.runs import STAGES, write, write_runs
from tests.report.test_against import ROOT, Repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Two commits of a project with this repository's DVC settings."""
    folder = tmp_path_factory.mktemp("plots") / "lutqat"
    made = Repository(write_runs(folder, best=1.875))
    made.run("git", "init", "--quiet", "--initial-branch=main")
    made.dvc("init", "--quiet")
    for name in (".dvc/config", "lib/report/plots.html"):
        write(folder / name, (ROOT / name).read_text(encoding="utf-8"))
    write(folder / ".gitignore", "/runs/*/*\n!/runs/*/*.json\n/dvc_plots/\n")
    made.commit("old")
    write_runs(folder)
    made.commit("new")
    return made


def plots(repository: Repository, *arguments: str) -> Path:
    repository.dvc("plots", *arguments)
    return repository.folder / "dvc_plots" / "index.html"


LOGS = [log for logs in STAGES.values() for log in logs]


@pytest.mark.parametrize("command", [("show",), ("diff", "HEAD~1", "HEAD")])
def test_no_script_of_others(repository: Repository, command: tuple[str, ...]) -> None:
    text = plots(repository, *command).read_text(encoding="utf-8")
    assert text.count("vegaEmbed('#") == len(LOGS)
    assert not re.search(r"<script[^>]*\ssrc=", text)
    loaded = re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)([^\"']*)", text)
    assert loaded == []
    assert "{plot_divs}" not in text and "{scripts}" not in text


def test_dvc_s_own_page_would_load_some(repository: Repository) -> None:
    """The control: without the setting there are scripts of a server."""
    repository.dvc("config", "--unset", "plots.html_template")
    try:
        text = plots(repository, "show").read_text(encoding="utf-8")
    finally:
        repository.run("git", "checkout", "--quiet", ".dvc/config")
    assert re.search(r"<script[^>]*\ssrc=\"https:", text)


@pytest.mark.skipif(PROGRAM is None, reason=NO_BROWSER)
def test_curves_are_drawn(repository: Repository, tmp_path: Path) -> None:
    page = plots(repository, "diff", "HEAD~1", "HEAD")
    with browser(tmp_path / "profile") as tab:
        for width, dark in ((400, True), (1400, False)):
            tab.open(page, width=width, dark=dark)
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert tab.requests() == [page.as_uri()]
            assert tab.complaints() == []
            assert tab.value("document.querySelectorAll('svg').length") == len(LOGS)
            # held-out losses at two steps, of two revisions
            assert tab.value("document.querySelectorAll('circle').length") == 4 * len(LOGS)
            names = tab.value(
                "[...document.querySelectorAll('li')].map((item) => item.textContent)"
            )
            assert names == ["HEAD~1", "HEAD"] * len(LOGS) or set(names) == {"HEAD~1", "HEAD"}
            first = tab.value("document.querySelector('circle title').textContent")
            assert re.fullmatch(r"HEAD(~1)?: 2.5 at step 0", first)
            colours = tab.picture().getcolors(1 << 24)
            assert colours is not None and len(colours) > 30


@pytest.mark.skipif(PROGRAM is None, reason=NO_BROWSER)
def test_other_plots_become_tables(repository: Repository, tmp_path: Path) -> None:
    write(repository.folder / "classes.csv", "actual,predicted\ncat,dog\ncat,<b>cat</b>\n")
    try:
        options = ("--template", "confusion", "-x", "actual", "-y", "predicted")
        page = plots(repository, "show", "classes.csv", *options)
        with browser(tmp_path / "profile") as tab:
            tab.open(page)
            assert tab.complaints() == []
            cells = "[...document.querySelectorAll('td')].map((cell) => cell.textContent)"
            assert {"cat", "dog", "<b>cat</b>"} <= set(tab.value(cells))
    finally:
        (repository.folder / "classes.csv").unlink()
