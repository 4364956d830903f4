"""Rivals in processes of their own, taking turns, so that their ratios hold on a busy machine.

A rival is built by a module-level function ``build(config) -> step``; each call of ``step`` does
one unit of work. Memory is the process's own peak while it worked, after building.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Build = Callable[[dict[str, Any]], Callable[[], None]]


def _reset_peak() -> None:
    """Forget the peak so far, where the system can (Linux)."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def peak_memory() -> int:
    """Peak resident bytes of this process (since the last reset, on Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve(build: Build, config: dict[str, Any], pipe: Connection) -> None:
    import torch

    torch.set_num_threads(config["threads"])
    step = build(config)
    for _ in range(config["warmup"]):
        step()
    _reset_peak()
    pipe.send("ready")
    while (order := pipe.recv()) == "step":
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)
    pipe.send((peak_memory(), _profile(step) if order == "profile" else {}))


def _profile(step: Callable[[], None]) -> dict[str, float]:
    """Share of a step's CPU time that each of the 12 costliest operations takes by itself."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    events = record.key_averages()
    spent = sum(event.self_cpu_time_total for event in events)
    events = sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]
    return {event.key: round(event.self_cpu_time_total / spent, 4) for event in events}


@dataclass
class Rival:
    """One contestant: its samples in seconds, peak memory in bytes and profile, filled by a
    contest."""

    name: str
    build: Build
    config: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    profile: dict[str, float] = field(default_factory=dict)


class Contest:
    """Rivals that are alive at the same time; use as a context manager."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[Rival, Any, Connection]] = {}

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.leave(name)

    def enter(self, rival: Rival) -> None:
        """Start a rival and wait until it has built and warmed up."""
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(rival.build, rival.config, there))
        process.start()
        there.close()
        here.recv()
        self._running[rival.name] = (rival, process, here)

    def leave(self, name: str) -> None:
        """End a rival and note its peak memory and where its time goes."""
        rival, process, pipe = self._running.pop(name)
        pipe.send("profile")
        rival.peak_bytes, rival.profile = pipe.recv()
        process.join()

    def round(self) -> None:
        """Every rival works once while the others idle."""
        for rival, _process, pipe in self._running.values():
            pipe.send("step")
            rival.seconds.append(pipe.recv())


def duel(contest: Contest, champion: Rival, rival: Rival, rounds: int) -> float:
    """Median over rounds of the rival's time by the champion's, who is in the contest already."""
    first = len(champion.seconds)
    contest.enter(rival)
    for _ in range(rounds):
        contest.round()
    contest.leave(rival.name)
    pairs = zip(rival.seconds, champion.seconds[first:], strict=True)
    return statistics.median(mine / its for mine, its in pairs)


def alone(rival: Rival, rounds: int) -> None:
    """A rival without a contest: only its own samples, memory and profile."""
    with Contest() as contest:
        contest.enter(rival)
        for _ in range(rounds):
            contest.round()
