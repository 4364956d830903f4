"""A process that has imported everything, and forks a child for each stage it is asked to run.

    python -m tests.faults.warm

Orders come as lines of JSON on stdin, answers go as lines of JSON to stdout: `{"run": ...}` gives
`{"pid": ...}`, `{"wait": pid}` gives `{"code": ...}` (negative: the signal that ended it) or
`{"stopped": true}`. Starting a stage so takes a fraction of a second instead of several.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.faults.injected import Fault, arm

ROOT = Path(__file__).parents[2]


def preload() -> None:
    """Import what the stages import; a stage's own module is run anew each time."""
    for path in sorted((ROOT / "stages").glob("[a-z]*.py")):
        importlib.import_module(f"stages.{path.stem}")
        del sys.modules[f"stages.{path.stem}"]
    for name in ("lib.recover.run", "lib.model.adapter", "lib.export.run", "coremltools"):
        importlib.import_module(name)


def be_stage(order: dict[str, Any]) -> int:
    """Become the stage: a process group, output, folder and arguments of its own; its exit code."""
    os.setsid()
    descriptor = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, nothing), (1, descriptor), (2, descriptor)):
        os.dup2(source, number)
    os.chdir(order["folder"])
    sys.argv = [order["stage"], *order["arguments"]]
    if order["fault"]:
        arm(Fault(**order["fault"]), Path(order["folder"]))
    try:
        runpy.run_module(f"stages.{order['stage']}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.settrace(None)
        sys.stdout.flush()
    return 0


def main() -> int:
    preload()
    print(json.dumps({"ready": True}), flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        if "run" in order:
            pid = os.fork()
            if not pid:
                return be_stage(order["run"])
            answer: dict[str, Any] = {"pid": pid}
        else:
            _, status = os.waitpid(order["wait"], os.WUNTRACED)
            if os.WIFSTOPPED(status):
                answer = {"stopped": True}
            else:
                answer = {"code": os.waitstatus_to_exitcode(status)}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
