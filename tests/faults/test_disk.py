"""A disk that is full, or fails, at any moment of a stage: one line, nothing lost, and the next
run ends as if nothing had happened.

tests/test_bad_input.py has the same for one write of Python's and one of Rust's.
"""

from __future__ import annotations

import errno

import pytest

from lib.base.errors import DISK_FULL_EXIT_CODE, MACHINE_EXIT_CODE
from tests.faults.counts import chosen, dice, some
from tests.faults.injected import Fault
from tests.faults.workshop import STAGES, Run, Workshop

NAMES = sorted(STAGES)
EACH = 2  # tries of a short run with a stage
LIMIT = 8192  # bytes: what a stage prints is a file too


def check(workshop: Workshop, stage: str, done: Run, codes: set[int]) -> None:
    """The stage ended with one line, or did without what failed; and the next run is whole."""
    if done.code:
        assert done.code in codes, done.output
        assert done.error
        workshop.check_nothing_half(stage)
    else:
        workshop.check_whole(stage)
    workshop.recover(stage)


@pytest.mark.parametrize("stage", chosen(NAMES, 2, "write"))
def test_a_write_that_fails(workshop: Workshop, stage: str) -> None:
    """Every open, write, fsync, close, rename, link and mkdir of Python's; the last is followed by
    success, so all of them were tried."""
    for number in some(range(1, workshop.count(stage, "writes") + 1), EACH):
        lasting = dice("lasting", stage, number).random() < 0.5
        print(f"{stage}: write {number} fails{', and all that follow' if lasting else ''}")
        fault = Fault(
            action="fail", events="writes", number=number, error=errno.ENOSPC, lasting=lasting
        )
        workshop.clear(stage)
        done = workshop.run(stage, fault)
        if done.code:
            assert "no space left on the disk" in done.error
        check(workshop, stage, done, {DISK_FULL_EXIT_CODE})


@pytest.mark.parametrize("stage", chosen(NAMES, 2, "size"))
def test_a_file_that_cannot_grow(workshop: Workshop, stage: str) -> None:
    """What Rust and C++ write fails too: no file may have more than so many bytes."""
    sizes = {
        size
        for name in workshop.whole[stage]
        if (size := workshop.folder.joinpath(name).stat().st_size) > LIMIT
    }
    wanted = sorted({LIMIT, *(size - 1 for size in sizes), *(size // 2 for size in sizes)})
    for number in some(range(len(wanted)), EACH):
        limit = max(wanted[number], LIMIT)
        print(f"{stage}: files of {limit} bytes")
        workshop.clear(stage)
        done = workshop.run(stage, Fault(action="limit", number=limit))
        check(workshop, stage, done, {DISK_FULL_EXIT_CODE})


@pytest.mark.parametrize("stage", chosen(NAMES, 2, "read"))
def test_a_read_that_fails(workshop: Workshop, stage: str) -> None:
    for number in some(range(1, workshop.count(stage, "reads") + 1), EACH):
        print(f"{stage}: read {number} fails")
        workshop.clear(stage)
        fault = Fault(action="fail", events="reads", number=number, error=errno.EIO)
        done = workshop.run(stage, fault)
        if done.code:
            assert "input/output error" in done.error
        check(workshop, stage, done, {MACHINE_EXIT_CODE})
