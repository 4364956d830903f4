"""Two runs of a stage at once, and a clock that jumps.

Two `dvc repro` at once, and a stage of an orphaned `dvc`: tests/pipeline/test_killed.py. Another
teacher's cache, a shard of another cache: tests/test_bad_input.py and tests/cache/test_shards.py.
"""

from __future__ import annotations

import os
import signal

import pytest

from lib.base.errors import BusyError
from tests.faults.counts import chosen, dice
from tests.faults.injected import Fault
from tests.faults.workshop import STAGES, Workshop

NAMES = sorted(STAGES)
LOCKED = 6  # the lock file and its folders are made in fewer writes


@pytest.mark.parametrize("stage", chosen(NAMES, 2, "together"))
def test_the_second_run_of_a_stage_is_refused(workshop: Workshop, stage: str) -> None:
    """The first is halted at a random write, the second comes and goes, the first ends well."""
    number = dice("halt", stage).randint(LOCKED, workshop.count(stage, "writes"))
    print(f"{stage} halted at write {number}")
    workshop.clear(stage)
    first = workshop.start(stage, Fault(action="stop", events="writes", number=number), "first")
    try:
        assert workshop.wait(first, "first") is None
        before = workshop.outputs(stage)
        second = workshop.run(stage)
        assert second.code == BusyError.exit_code, second.output
        assert f"stage {stage} is already running in another process" in second.error
        assert workshop.outputs(stage) == before
        os.kill(first, signal.SIGCONT)
        done = workshop.wait(first, "first")
    except BaseException:
        workshop.kill(first)
        raise
    assert done is not None and done.code == 0, done
    workshop.check_whole(stage)


@pytest.mark.parametrize("stage", chosen(NAMES, 2, "clock"))
def test_a_jumping_clock_changes_nothing(workshop: Workshop, stage: str) -> None:
    workshop.clear(stage)
    done = workshop.run(stage, Fault(action="clock", number=dice("years", stage).randint(0, 40)))
    assert done.code == 0, done.output
    workshop.check_whole(stage)


@pytest.mark.parametrize(("stage", "years"), [("cache", 30), ("scales", -30)])
def test_a_run_goes_on_from_a_state_of_another_time(
    workshop: Workshop, stage: str, years: int
) -> None:
    """Files that look decades old or new are what they are."""
    number = workshop.count(stage, "writes") * 2 // 3
    workshop.clear(stage)
    done = workshop.run(stage, Fault(action="kill", events="writes", number=number))
    assert done.code == -signal.SIGKILL
    for path in workshop.folder.joinpath(".ckpt").rglob("*"):
        seconds = path.stat().st_mtime + years * 365 * 24 * 3600
        os.utime(path, (seconds, seconds))
    done = workshop.run(stage, Fault(action="clock", number=0))
    assert done.code == 0, done.output
    assert "going on after step" in done.output or "cache train: 16 to do" not in done.output
    workshop.check_whole(stage)
