"""The command as a whole: help that teaches, a start without torch, errors as one line."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lib.cli.main import app
from tests.cli.run import lutqat

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("generate", "chat", "inspect", "profile", "convert-checkpoint", "merge-adapter", "plot"),
    "report",
)


def test_help_names_every_command() -> None:
    outcome = lutqat("--help")
    assert outcome.code == 0
    assert all(name in outcome.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name: str) -> None:
    text = " ".join(lutqat(name, "--help").out.split())
    assert f"Example: lutqat {name} " in text


def test_console_script_is_this_app() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["lutqat"] == "lib.cli.main:app"
    assert app.info.name == "lutqat"


def test_module_runs_and_starts_without_torch() -> None:
    """What makes a command slow to start is not even imported."""
    code = (
        "import sys\n"
        "from lib.cli.main import app\n"
        "try:\n    app(['profile'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "tiny" in result.stdout


def test_entry_point_in_a_process_of_its_own(models: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "lib.cli.main", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    good = run("inspect", str(models / "snapped"))
    assert good.returncode == 0, good.stderr
    assert "bits per weight" in good.stdout
    bad = run("profile", "tyny")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: no profile 'tyny'; did you mean tiny?")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "chat", "inspect"])
@pytest.mark.parametrize(("name", "code"), [("none", 3), ("file", 3), ("empty", 3), ("broken", 5)])
def test_bad_folders(tmp_path: Path, command: str, name: str, code: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    prompt = ["Hi"] if command == "generate" else []
    lutqat(command, tmp_path / name, *prompt).refused_with(code, name)


def test_usage_errors() -> None:
    assert lutqat("generate").code == 2
    assert lutqat("unknown").code == 2
    assert lutqat("generate", "x", "y", "--max-tokens", "0").code == 2
