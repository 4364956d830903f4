"""A power cut in the middle of a stage, orphans, and two runs at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from lib.base.errors import BusyError
from lib.params.load import read_yaml
from tests.pipeline.project import RUNS, Project

SHARDS = "cache lib.capture.build write_shard 2"
STEP_7 = "scales lib.train.loop rows_of 7"  # states are saved every 4 steps
SAVING = "scales lib.train.state write_sealed 2"
LAYER_3 = "convert lib.convert.convert quantize_anew 3"
WRITING = "convert lib.model.checkpoint write_json 1"


def cut_power(project: Project, halt: str) -> None:
    """Run the pipeline until ``halt``, where everything is killed."""
    project.dvc("repro", status=-signal.SIGKILL, HALT=f"{halt} kill")


def finish(project: Project, baseline: Project, stage: str) -> str:
    """Run to the end: only ``stage`` runs, and everything is as if it had never been killed.

    Returns what the run printed.
    """
    assert stage not in project.locked()
    (project.folder / RUNS).unlink()
    output = project.dvc("repro")
    assert project.ran() == [stage], output
    assert project.locked() == baseline.locked()
    assert project.metrics(stage) == baseline.metrics(stage)
    assert [path.suffix for path in project.folder.glob(f".ckpt/{stage}/*")] in ([".lock"], [])
    assert not list(project.folder.glob("*/*/.tmp-*"))
    assert "up to date" in project.dvc("repro")
    return output


def test_cache(project: Project, baseline: Project) -> None:
    project.forget("cache")
    cut_power(project, SHARDS)
    shards = list(project.folder.glob(".ckpt/cache/*/train/shard-*.arrow"))
    assert [shard.name for shard in shards] == ["shard-00000.arrow"]
    # 16 batches; the two of the finished shard are not computed again
    assert "cache train: 14 to do" in finish(project, baseline, "cache")


def test_convert_while_converting_and_while_writing(project: Project, baseline: Project) -> None:
    project.forget("convert")
    cut_power(project, LAYER_3)
    cut_power(project, WRITING)
    assert list(project.folder.glob("runs/convert/.tmp-model/*.safetensors"))
    finish(project, baseline, "convert")


def wait_for_halt(project: Project, process: subprocess.Popen[str]) -> None:
    while ["halted"] not in project.runs():
        assert process.poll() is None
        time.sleep(0.05)


def one_error(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return line


def test_scales_while_others_try_too_and_while_saving(project: Project, baseline: Project) -> None:
    project.forget("scales")
    first = project.start_dvc("repro", HALT=f"{STEP_7} wait")
    try:
        wait_for_halt(project, first)
        (state,) = project.folder.glob(".ckpt/scales/*/state/state.json")
        assert json.loads(state.read_text())["progress"]["step"] == 4
        # a second stage process, whoever started it
        command = read_yaml(project.folder / "dvc.yaml")["stages"]["scales"]["cmd"].split()
        assert command.pop(0) == "python"
        output = project.run(sys.executable, *command, status=BusyError.exit_code)
        assert "stage scales is already running in another process" in one_error(output)
        # a second DVC sees the first one's claim on the outputs
        assert "is busy, it is being blocked by" in project.dvc("repro", status=255)
        # DVC alone dies: its trainer lives on, and holds the stage's lock against the next run
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert "stage scales is already running" in one_error(project.dvc("repro", status=255))
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    cut_power(project, SAVING)
    assert json.loads(state.read_text())["progress"]["step"] == 8
    assert "going on after step " in finish(project, baseline, "scales")
