"""Stands in for `python` in a pipeline under test: notes what it runs, and can halt it.

    python -m tests.pipeline.halting -m stages.cache ARGUMENTS

RUNS names a file that gets a line per stage: its name, the working directory and the file of the
library it imported. HALT = "cache lib.capture.build write_shard 2 kill" halts stage cache at the
second call of that function: `kill` is a power cut (SIGKILL of the process group, DVC included),
`wait` writes "halted" to the RUNS file and sleeps until somebody ends the process.
"""

from __future__ import annotations

import importlib
import itertools
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any


def note(*words: object) -> None:
    with Path(os.environ["RUNS"]).open("a", encoding="utf-8") as file:
        print(*words, file=file)


def arm(module: str, function: str, call: int, how: str) -> None:
    owner = importlib.import_module(module)
    original = getattr(owner, function)
    calls = itertools.count(1)

    def halt_or_go_on(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            if how == "kill":
                os.killpg(0, signal.SIGKILL)
            note("halted")
            time.sleep(600)
        return original(*arguments, **options)

    setattr(owner, function, halt_or_go_on)


def main() -> None:
    flag, module, *arguments = sys.argv[1:]
    assert flag == "-m"
    stage = module.removeprefix("stages.")
    note(stage, Path.cwd(), importlib.import_module("lib").__file__)
    match os.environ.get("HALT", "").split():
        case [wanted, owner, function, call, how] if wanted == stage:
            arm(owner, function, int(call), how)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
