"""What goes wrong inside a stage under test: kills, failing files, a jumping clock.

A :class:`Fault` strikes at its n-th event. Events are counted, not timed, so that a failure can
be repeated: calls of functions of ``lib``, and what Python does to files below the project.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

LIB = str(Path(__file__).parents[2] / "lib") + os.sep
YEAR = 365.25 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        action: `kill` (SIGKILL of the process group), `stop` (SIGSTOP), `fail` (an OSError),
            `limit` (files may have ``number`` bytes: this reaches what Rust and C++ write),
            `clock` (time.time jumps at every call), `count` (the events go into ``note``).
        events: `calls` of functions of lib, `writes` (open, write, fsync, close, rename, link,
            mkdir of what is written) or `reads`.
        number: at which event; from 1.
        error: the error number of `fail`.
        lasting: `fail` strikes at every later event too.
    """

    action: str
    events: str = "calls"
    number: int = 0
    error: int = 0
    lasting: bool = False
    note: str = ""


class Striker:
    """Counts events and strikes."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.count = 0

    def event(self, path: str = "") -> None:
        """One more event; ``path`` is the file it happens to."""
        self.count += 1
        fault = self.fault
        late = fault.lasting and self.count > fault.number
        if fault.action == "count" or (self.count != fault.number and not late):
            return
        if fault.action == "kill":
            os.killpg(0, signal.SIGKILL)
        if fault.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault.action == "fail":
            raise OSError(fault.error, os.strerror(fault.error), path)


def arm(fault: Fault, root: Path) -> None:
    """From now on ``fault`` may strike in this process, which works in the folder ``root``."""
    if fault.action == "limit":
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.number, most))
        return
    if fault.action == "clock":
        _jump(fault.number)
        return
    striker = Striker(fault)
    if fault.events == "calls":
        _watch_calls(striker.event)
    else:
        _watch_files(striker.event, str(root.resolve()) + os.sep, writing=fault.events == "writes")
    if fault.action == "count":
        import atexit

        atexit.register(lambda: _note(fault.note, striker.count))


def _note(path: str, count: int) -> None:
    with Path(path).open("a", encoding="utf-8") as file:
        print(count, file=file)


def _jump(seed: int) -> None:
    """Make the clock go back and forth by years from call to call."""
    real, calls = time.time, itertools.count(seed)

    def jumping() -> float:
        return real() + YEAR * (next(calls) * 7 % 41 - 20)

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)


def _watch_calls(event: Callable[[], None]) -> None:
    def trace(frame: FrameType, what: str, argument: object) -> None:
        if frame.f_code.co_filename.startswith(LIB):
            event()

    sys.settrace(trace)


def _watch_files(event: Callable[[str], None], root: str, *, writing: bool) -> None:
    """Report what Python does to files below ``root``: all that writes, or all that reads."""

    def inside(path: Any) -> str | None:
        if not isinstance(path, str | os.PathLike):
            return None
        absolute = os.path.abspath(os.fspath(path))  # noqa: PTH100 (no file is looked at)
        return absolute if absolute.startswith(root) else None

    class Watched(io.FileIO):
        """A file that reports."""

        def write(self, data: Any) -> int:
            if writing:
                event(str(self.name))
            return super().write(data)

        def readinto(self, buffer: Any) -> int:
            if not writing:
                event(str(self.name))
            return super().readinto(buffer)

        def readall(self) -> bytes:
            if not writing:
                event(str(self.name))
            return super().readall()

        def close(self) -> None:
            first = not self.closed
            super().close()
            if first and writing:
                event(str(self.name))

    plain_open = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        path, writes = inside(file), bool(set(mode) & set("wax+"))
        if path is None or writes is not writing or named.get("opener"):
            return plain_open(file, mode, buffering, *rest, **named)
        if writing:
            event(path)
        raw = Watched(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        kind: Any = io.BufferedWriter if writes else io.BufferedReader
        buffer = (io.BufferedRandom if "+" in mode else kind)(raw)
        if "b" in mode:
            return buffer
        options = dict(zip(("encoding", "errors", "newline"), rest, strict=False)) | named
        return io.TextIOWrapper(buffer, **{k: v for k, v in options.items() if k != "closefd"})

    builtins.open = io.open = opened
    if writing:
        _watch_calls_of_os(event, inside)


def _watch_calls_of_os(event: Callable[[str], None], inside: Callable[[Any], str | None]) -> None:
    """Report os.open for writing, fsync, rename, link, mkdir and sendfile."""
    names: dict[int, str] = {}
    plain_open, plain_fsync = os.open, os.fsync

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        found = inside(path) if dir_fd is None else None
        if found and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            event(found)
        descriptor = plain_open(path, flags, mode, dir_fd=dir_fd)
        names[descriptor] = found or ""
        return descriptor

    def fsync(descriptor: int) -> None:
        if found := names.get(descriptor):
            event(found)
        plain_fsync(descriptor)

    def target(name: str) -> None:
        plain = getattr(os, name)

        def call(*paths: Any, **options: Any) -> Any:
            found = inside(paths[1 if name in ("replace", "rename", "link") else 0])
            if found:
                event(found)
            return plain(*paths, **options)

        setattr(os, name, call)

    os.open, os.fsync = open_, fsync  # type: ignore[assignment]
    for name in ("replace", "rename", "link", "mkdir"):
        target(name)
    if hasattr(os, "sendfile"):  # shutil copies with it, below any file object
        plain_send = os.sendfile

        def sendfile(*arguments: Any) -> int:
            event("")
            return plain_send(*arguments)

        os.sendfile = sendfile  # type: ignore[assignment]
