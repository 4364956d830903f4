"""A finished tiny pipeline whose stages are run again and again, with faults."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib.params.load import read_yaml
from tests.architecture import outputs_of
from tests.faults.injected import Fault
from tests.pipeline.project import MACHINE, ROOT

STAGES: dict[str, Any] = read_yaml(ROOT / "dvc.yaml")["stages"]
GROWING = ("metrics.json", "log.csv")  # rewritten while a stage trains
TEMPORARY = ".tmp-"


class Warm:
    """The process of tests/faults/warm.py; ``temporary`` is its folder for temporary files."""

    def __init__(self, temporary: Path) -> None:
        hidden = ("DVC_", "GIT_", "RANK", "WORLD_SIZE", "LUTQAT_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            cwd=ROOT,
            env={
                **environment,
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "TMPDIR": str(temporary),  # what a killed stage leaves there
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the warm process has died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and return the answer."""
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclasses.dataclass(frozen=True)
class Run:
    """A stage that ended: its exit code (negative: a signal) and what it printed."""

    code: int
    output: str

    @property
    def error(self) -> str:
        """Its one error line, the last thing it said; there was no traceback."""
        assert "Traceback" not in self.output, self.output
        lines = self.output.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.output
        return lines[-1].removeprefix("error: ")


class Workshop:
    """Runs stages in a copy of a finished project, and knows what they should leave.

    Args:
        folder: the copy.
        warm: runs its stages.
        whole: what it is a copy of.
    """

    def __init__(self, folder: Path, warm: Warm, whole: Path) -> None:
        self.folder, self.warm, self._finished = folder, warm, whole
        self.whole = {stage: self.outputs(stage) for stage in STAGES}
        self._counts: dict[tuple[str, str], int] = {}
        self._seconds: dict[str, float] = {}

    def start(self, stage: str, fault: Fault | None = None, output: str = "output") -> int:
        """Start a stage as dvc.yaml says and return its process id."""
        _, _, _, *arguments = STAGES[stage]["cmd"].split()
        order = {
            "stage": stage,
            "arguments": arguments,
            "folder": str(self.folder),
            "output": str(self._output(output)),
            "fault": dataclasses.asdict(fault) if fault else None,
        }
        return int(self.warm.ask(run=order)["pid"])

    def _output(self, name: str) -> Path:
        return self.folder.parent / f"{self.folder.name}-{name}"

    def wait(self, pid: int, output: str = "output") -> Run | None:
        """The outcome of a stage, when it has ended; None where it has stopped instead."""
        answer = self.warm.ask(wait=pid)
        if "stopped" in answer:
            return None
        return Run(answer["code"], self._output(output).read_text(errors="replace"))

    def run(self, stage: str, fault: Fault | None = None) -> Run:
        """Run a stage to its end."""
        done = self.wait(self.start(stage, fault))
        assert done is not None
        return done

    def count(self, stage: str, events: str) -> int:
        """How many such events an undisturbed run of a stage has."""
        if (stage, events) not in self._counts:
            note = self._output("count")
            note.unlink(missing_ok=True)
            self.clear(stage)
            done = self.run(stage, Fault(action="count", events=events, note=str(note)))
            assert done.code == 0, done.output
            self._counts[stage, events] = int(note.read_text())
            note.unlink()
        return self._counts[stage, events]

    def seconds(self, stage: str) -> float:
        """About how long an undisturbed run of a stage takes."""
        if stage not in self._seconds:
            self.clear(stage)
            started = time.monotonic()
            assert self.run(stage).code == 0
            self._seconds[stage] = time.monotonic() - started
        return self._seconds[stage]

    def kill(self, pid: int) -> None:
        """SIGKILL for a stage and all that it started."""
        for end in (os.killpg, os.kill):  # its group is its own only after its first moments
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)

    def clear(self, stage: str) -> None:
        """Delete what a stage wrote and what it left to resume from, as if it had never run."""
        for path in outputs_of(STAGES[stage]):
            target = self.folder / path
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
        shutil.rmtree(self.folder / ".ckpt", ignore_errors=True)

    def mend(self) -> None:
        """Make everything whole again after a test that failed."""
        if all(self.outputs(stage) == self.whole[stage] for stage in STAGES):
            return
        for name in ("data", "runs"):
            shutil.rmtree(self.folder / name)
            shutil.copytree(self._finished / name, self.folder / name)

    def outputs(self, stage: str) -> dict[str, str]:
        """Every file of a stage's outputs, temporary ones included, with its digest; without
        figures that are the machine's."""
        found = {}
        for output in outputs_of(STAGES[stage]):
            path = self.folder / output
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                name = file.relative_to(self.folder).as_posix()
                if file.is_file() and name not in MACHINE:
                    found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found

    def others(self, stage: str) -> dict[str, str]:
        """The outputs of all other stages."""
        return {k: v for name in STAGES if name != stage for k, v in self.outputs(name).items()}

    def check_nothing_half(self, stage: str) -> None:
        """After whatever happened: what stands under its final name is whole, and the results of
        the other stages are as they were."""
        for name, digest in self.outputs(stage).items():
            if TEMPORARY in name:
                continue
            if Path(name).name in GROWING:
                text = (self.folder / name).read_text()
                assert text.endswith("\n"), name
                assert name.endswith(".csv") or json.loads(text)
            else:
                assert digest == self.whole[stage].get(name), name
        expected = {k: v for name in STAGES if name != stage for k, v in self.whole[name].items()}
        assert self.others(stage) == expected

    def check_whole(self, stage: str) -> None:
        """A stage's outputs are those of an undisturbed run, and nothing else is left."""
        self.check_nothing_half(stage)
        assert self.outputs(stage) == self.whole[stage]
        places = [self.folder / path for path in outputs_of(STAGES[stage])]
        left = {p for place in places for p in place.parent.rglob(f"{TEMPORARY}*")}
        assert not left
        kept = [path for path in self.folder.glob(".ckpt/*/*") if path.suffix != ".lock"]
        assert not kept

    def recover(self, stage: str) -> Run:
        """Run a stage once more, to its end, and check the result."""
        done = self.run(stage)
        assert done.code == 0, done.output
        self.check_whole(stage)
        return done
