"""A measurement in a process of its own: its memory is its own, and its end is nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


def _answer(
    connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    connection.send(function(*arguments))


def apart(function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
    """``function(*arguments)`` in a new process, which is ended with the call.

    Args:
        limit: seconds to wait for the result; None = as long as it takes.

    Raises:
        TimeoutError: there is no result after ``limit`` seconds.
        ChildProcessError: the process ended without one; what it raised stands on stderr.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()  # so that the end of the process is the end of what can be read
    try:
        if not ours.poll(limit):
            raise TimeoutError(f"no result after {limit:g} s")
        return ours.recv()
    except EOFError:
        raise ChildProcessError("its process died") from None
    finally:
        process.kill()
        process.join()
        ours.close()
