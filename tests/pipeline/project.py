"""A copy of this repository in which the pipeline runs, as a user would run it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.params.load import read_yaml

ROOT = Path(__file__).parents[2]
STAGES = tuple(read_yaml(ROOT / "dvc.yaml")["stages"])
TRACKED = (
    *("lib", "stages", "profiles", "tests/data", "data/local"),
    *("tests/__init__.py", "tests/pipeline/__init__.py", "tests/pipeline/halting.py"),
    *(".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"),
)
RUNS = ".dvc/tmp/runs"  # where halting.py notes what ran
MACHINE = {"runs/evaluate/ladder.json", "runs/evaluate/ladder.md"}  # they tell the memory used


@dataclass(frozen=True)
class Project:
    """A folder with the pipeline in it."""

    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        """One thread, no configuration of this machine, and `python` is tests.pipeline.halting."""
        private = self.folder.parent / "private"
        programs = (self.folder.parent / "bin", Path(sys.executable).parent)
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))},
            "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
            "RUNS": str(self.folder / RUNS),
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(private / "site"),
            "DVC_GLOBAL_CONFIG_DIR": str(private / "global"),
            "DVC_SYSTEM_CONFIG_DIR": str(private / "system"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
            **{
                f"GIT_{who}_{what}": value
                for who in ("AUTHOR", "COMMITTER")
                for what, value in (("NAME", "Test"), ("EMAIL", "test@example.org"))
            },
            **more,
        }

    def start(self, *command: str, output: Any, **more: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own; ``output`` gets stdout and stderr."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(**more),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, status: int | None = 0, **more: str) -> str:
        """Run a command to its end and return what it printed; None allows any exit status.

        The output goes into a file: the worker that `dvc queue start` leaves behind would hold a
        pipe open.
        """
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            process = self.start(*command, output=file, **more)
            try:
                code = process.wait(timeout=1200)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            file.seek(0)
            output = file.read()
        assert status is None or code == status, output
        return output

    def dvc(self, *arguments: str, status: int | None = 0, **more: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, status=status, **more)

    def start_dvc(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        command = (sys.executable, "-m", "dvc", *arguments)
        return self.start(*command, output=subprocess.DEVNULL, **more)

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", f"--message={message}")

    def runs(self) -> list[list[str]]:
        """What halting.py noted: [stage, working directory, file of the library], ..."""
        path = self.folder / RUNS
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def ran(self) -> list[str]:
        """The stages that really ran."""
        return [line[0] for line in self.runs()]

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def metrics(self, stage: str) -> dict[str, Any]:
        where = "data" if stage in ("teacher", "tokens", "cache") else "runs"
        values: dict[str, Any] = json.loads(self.read(f"{where}/{stage}/metrics.json"))[stage]
        return values

    def set(self, section: str, key: str, value: str) -> None:
        """Change one key of params.yaml, as an editor would."""
        lines = self.read("params.yaml").splitlines(keepends=True)
        start = lines.index(next(line for line in lines if line.startswith(f"{section}:")))
        number = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {key}:"))
        lines[number] = f"  {key}: {value}\n"
        (self.folder / "params.yaml").write_text("".join(lines), encoding="utf-8")

    def locked(self) -> dict[str, Any]:
        """What dvc.lock says of each stage."""
        stages: dict[str, Any] = read_yaml(self.folder / "dvc.lock")["stages"]
        return stages

    def outputs(self, stage: str) -> dict[str, str]:
        """Output -> checksum, as dvc.lock has them."""
        return {out["path"]: out["md5"] for out in self.locked()[stage]["outs"]}

    def forget(self, stage: str) -> None:
        """Make ``stage`` something that was never run: no result, no line in dvc.lock, and an
        empty run cache, from which DVC could bring the result back."""
        for path in self.outputs(stage):
            target = self.folder / path
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        values = read_yaml(self.folder / "dvc.lock")
        del values["stages"][stage]
        (self.folder / "dvc.lock").write_text(json.dumps(values), encoding="utf-8")
        shutil.rmtree(self.folder / ".dvc/cache/runs")

    def copy(self, folder: Path) -> Project:
        """A working copy, DVC's cache included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        made = Project(folder)
        made.install_python()
        (folder / RUNS).unlink(missing_ok=True)
        return made

    def install_python(self) -> None:
        """A folder for PATH in which `python` is this Python, by way of halting.py."""
        script = self.folder.parent / "bin" / "python"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.pipeline.halting "$@"\n')
        script.chmod(0o755)


def make_project(folder: Path) -> Project:
    """The repository's code, committed, with the tiny profile and nothing run yet."""
    for name in TRACKED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    project = Project(folder)
    project.install_python()
    (folder / RUNS).parent.mkdir()
    project.run(sys.executable, "-c", "import lib.params.profile as p; p.apply_profile('tiny')")
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit("the tiny pipeline")
    return project
