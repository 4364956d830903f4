"""SIGKILL at a random moment of a random stage: the next run ends as if nothing had happened.

tests/pipeline/test_killed.py has kills at chosen moments, orphans, and two `dvc repro` at once;
tests/pipeline/test_processes.py has one process of several killed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest

from tests.faults.counts import dice, often
from tests.faults.injected import Fault
from tests.faults.workshop import STAGES, Workshop
from tests.pipeline.project import MACHINE, Project

DIRECT, THROUGH_DVC = often(4, 180), often(1, 20)
NAMES = sorted(STAGES)


def kill_somewhere(workshop: Workshop, stage: str, chance: random.Random) -> str:
    """Run a stage until it is killed, or to its end where the kill comes too late; says when."""
    how = chance.choice(("calls", "writes", "seconds"))
    if how == "seconds":
        delay = chance.random() * workshop.seconds(stage)
        workshop.clear(stage)
        pid = workshop.start(stage)
        time.sleep(delay)
        workshop.kill(pid)
        workshop.wait(pid)
        return f"{stage} killed after {delay:.3f} s"
    number = chance.randint(1, workshop.count(stage, how))
    workshop.clear(stage)
    done = workshop.run(stage, Fault(action="kill", events=how, number=number))
    assert done.code == -signal.SIGKILL, done.output
    return f"{stage} killed at {number} of its {how}"


def kill_again(workshop: Workshop, stage: str, chance: random.Random) -> str:
    """Kill the run that goes on, at a write that it may not come to; says when."""
    number = chance.randint(1, workshop.count(stage, "writes"))
    fault = Fault(action="kill", events="writes", number=number)
    done = workshop.run(stage, fault)
    assert done.code in (0, -signal.SIGKILL), done.output
    return f"and at write {number}"


@pytest.mark.parametrize("number", range(DIRECT))
def test_a_killed_stage_ends_as_if_it_had_not_been(workshop: Workshop, number: int) -> None:
    chance = dice("kill", number)
    stage = chance.choice(NAMES)
    print(kill_somewhere(workshop, stage, chance))
    workshop.check_nothing_half(stage)
    while chance.random() < 0.3:
        print(kill_again(workshop, stage, chance))
        workshop.check_nothing_half(stage)
    workshop.recover(stage)


def comparable(project: Project) -> dict[str, Any]:
    """dvc.lock without the outputs that tell of the machine."""
    stages = project.locked()
    for stage in stages.values():
        stage["outs"] = [out for out in stage["outs"] if out["path"] not in MACHINE]
    return stages


@pytest.mark.parametrize("number", range(THROUGH_DVC))
def test_a_killed_pipeline_ends_as_if_it_had_not_been(
    baseline: Project, project: Project, number: int
) -> None:
    chance = dice("dvc", number)
    stage = chance.choice(NAMES)
    project.forget(stage)
    process = project.start_dvc("repro", "--single-item", stage)
    delay = 1 + chance.random() * 9  # from DVC's own start to the end of a stage
    time.sleep(delay)
    print(f"{stage} killed after {delay:.3f} s")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output = project.dvc("repro")
    assert comparable(project) == comparable(baseline), output
    assert "up to date" in project.dvc("repro")
    assert not [path for path in project.folder.glob(".ckpt/*/*") if path.suffix != ".lock"]
