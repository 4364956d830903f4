"""Seconds per stage of `dvc repro` of the default experiment, from nothing, in a fresh clone.

    python -m benchmarks.pipeline

A stage's time runs from its start to the next one's, so it holds what DVC does for it (hashing,
caching its outputs); nothing is left out, and the parts add up to the whole.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import machine, save

ROOT = Path(__file__).parents[1]
_STARTED = re.compile(r"^Running stage '(\w+)'")


def time_repro(folder: Path) -> dict[str, float]:
    """Wall-clock seconds per stage of `dvc repro` in ``folder``, in order."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    marks: list[tuple[str, float]] = []
    start = time.perf_counter()
    with subprocess.Popen(
        ["dvc", "repro"],
        cwd=folder,
        env={**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := _STARTED.match(line):
                marks.append((found[1], time.perf_counter()))
    if process.returncode != 0:
        raise SystemExit(f"dvc repro failed with exit code {process.returncode}")
    names = ["start", *(name for name, _ in marks)]
    at = [start, *(at for _, at in marks), time.perf_counter()]
    return {name: at[i + 1] - at[i] for i, name in enumerate(names)}


def main() -> None:
    """Time the pipeline and write ``results/pipeline.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="clone here and keep it")
    options = parser.parse_args()
    on = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary, "clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        seconds = time_repro(folder)
    summary = {"repro_seconds": sum(seconds.values())}
    save("pipeline", config={"experiment": "default"}, samples=seconds, summary=summary, on=on)


if __name__ == "__main__":
    main()
