"""`lutqat report --against REV`: two revisions, read without checking either out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.base.errors import InputError
from lib.report.experiment import read_experiment
from lib.report.page import render
from lib.report.source import revision, workspace
from lib.report.values import DASH, MINUS
from tests.report.runs import STAGES, Page, write, write_runs

ROOT = Path(__file__).parents[2]
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Test"), ("EMAIL", "test@example.org"))
}


class Repository:
    """A folder with git and DVC in it, which see no configuration of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        private = folder.parent / "private"
        self.settings = {
            **IDENTITY,
            **{f"DVC_{n}_CONFIG_DIR": str(private / n) for n in ("GLOBAL", "SYSTEM")},
            **{f"GIT_CONFIG_{n}": os.devnull for n in ("GLOBAL", "SYSTEM")},
            "DVC_SITE_CACHE_DIR": str(private / "site"),
            "DVC_NO_ANALYTICS": "1",
        }

    def run(self, *command: str, status: int = 0) -> str:
        """What a command prints, standard error included."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**inherited, **self.settings, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def against(self, rev: str) -> Page:
        """The page of the workspace against ``rev``."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.settings.items():
                patch.setenv(name, value)
            other = read_experiment(revision(self.folder, rev))
        return Page(render(read_experiment(workspace(self.folder)), other))

    def commit(self, message: str) -> None:
        """As after `dvc repro`: outputs in DVC's cache, the rest in git."""
        ran = [stage for stage in STAGES if (self.folder / "runs" / stage).is_dir()]
        self.dvc("commit", "--force", "--quiet", *ran)
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", f"--message={message}")

    def state(self) -> dict[str, str]:
        """Digest of every file but git's and DVC's own working files and the page."""
        kept = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not name.startswith((".git/", ".dvc/tmp/", "runs/report")):
                kept[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        for ref in ("HEAD", "--all"):
            kept[ref] = self.run("git", "rev-parse", ref)
        return kept


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Branch `old`, experiment `trial` and what came after them, committed on main."""
    folder = tmp_path_factory.mktemp("against") / "lutqat"
    made = Repository(write_runs(folder, best=1.875, snapped=55.125))
    made.run("git", "init", "--quiet", "--initial-branch=main")
    made.dvc("init", "--quiet")
    write(folder / ".gitignore", "/runs/*/*\n!/runs/*/*.json\n/runs/*.html\n")
    made.commit("old results")
    made.run("git", "branch", "old")
    reference = "refs/exps/" + made.run("git", "rev-parse", "HEAD")[:2] + "/" + "0" * 38 + "/trial"
    made.run("git", "update-ref", reference, "HEAD")
    write_runs(folder)
    params = json.loads((folder / "params.yaml").read_text())
    params["quant"]["lut_size"] = 64
    params["scales"]["rates"]["new_rate"] = 0.5
    write(folder / "params.yaml", json.dumps(params))
    made.commit("new results")
    return made


def test_both_experiments_are_on_the_page(repository: Repository) -> None:
    page = repository.against("old")
    commit = repository.run("git", "rev-parse", "--short=7", "old").strip()
    assert f"old ({commit})" in page.text
    exact = page.exact()
    assert {"34.448", "55.125", "1.234567", "1.875"} <= set(exact)
    assert json.dumps(34.448 - 55.125) in exact
    assert "2 parameters differ" in page.text
    assert "quant.lut_size 64 16" in page.text
    assert f"scales.rates.new_rate 0.5 {DASH}" in page.text


def test_curves_of_the_revision_come_out_of_the_cache(repository: Repository) -> None:
    """log.csv is no file of git's: its text is in DVC's cache only."""
    page = repository.against("old")
    charts = [chart["aria-label"] for chart in page.named("svg")]
    (scales,) = (label for label in charts if label.startswith("scales:"))
    assert "workspace: 2.5 → 1.235" in scales
    assert "2.5 → 1.875" in scales
    dashed = [a for a in page.named("polyline") if "other" in a["class"].split()]
    assert len(dashed) >= 2 * 4


@pytest.mark.parametrize("rev", ["old", "trial", "HEAD~1", "main~1"])
def test_whatever_names_the_revision(repository: Repository, rev: str) -> None:
    assert "55.125" in repository.against(rev).exact()


def test_nothing_changes_but_the_page(repository: Repository) -> None:
    """The command itself, in a process of its own."""
    before = repository.state()
    command = (sys.executable, "-W", "error", "-m", "lib.cli.main", "report", "--against", "trial")
    assert repository.run(*command) == "wrote runs/report.html\n"
    text = (repository.folder / "runs/report.html").read_text(encoding="utf-8")
    assert "55.125" in Page(text).exact()
    assert repository.state() == before
    assert repository.run("git", "status", "--porcelain") == ""


def test_against_itself(repository: Repository) -> None:
    page = repository.against("HEAD")
    assert "All parameters are the same." in page.text
    assert "Metrics that differ" not in page.text and MINUS not in page.text


def test_what_the_cache_lacks_is_told(repository: Repository, tmp_path: Path) -> None:
    clone = Repository(tmp_path / "clone")
    repository.run("git", "clone", "--quiet", str(repository.folder), str(clone.folder))
    page = clone.against("HEAD~1")
    assert "55.125" in page.exact()
    assert "No training stage left a log.csv" in page.text


def test_bad_revisions(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no revision nowhere"):
        repository.against("nowhere")
    plain = Repository(write_runs(tmp_path / "plain"))
    with pytest.raises(InputError, match="cannot compare with main"):
        plain.against("main")
    write(plain.folder / ".dvc/config", "[core]\n    no_scm = true\n")
    with pytest.raises(InputError, match="there is no git repository here"):
        plain.against("main")
    tree = repository.run("git", "mktree", "--missing").strip()
    empty = repository.run("git", "commit-tree", "-m", "nothing", tree).strip()
    with pytest.raises(InputError, match="no pipeline.*name a revision that has one"):
        repository.against(empty)
