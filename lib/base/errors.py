"""Errors meant for the user: one line each, with the value, what is allowed and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class LutqatError(Exception):
    """Base of every error whose message is written for the user. The message is a single line."""

    exit_code = 1


class ParamsError(LutqatError):
    """A key of params.yaml is unknown, of the wrong type, or impossible."""

    exit_code = 2


class InputError(LutqatError):
    """A file, data set or model that the user named is missing, empty or unusable."""

    exit_code = 3


class MismatchError(LutqatError):
    """Two things that must belong together (teacher, cache, checkpoint, vocabulary) do not."""

    exit_code = 4


class CorruptError(LutqatError):
    """A file of ours is short, damaged, or not what its name says."""

    exit_code = 5


class NonFiniteError(LutqatError):
    """A loss, gradient or weight became NaN or infinite."""

    exit_code = 6


class GateError(LutqatError):
    """A check that guards the pipeline failed (FP16 limits, snap ranges)."""

    exit_code = 7


class BusyError(LutqatError):
    """Another process holds the lock of the same run."""

    exit_code = 8


DISK_FULL_EXIT_CODE = 9


def _is_disk_full(error: Exception) -> bool:
    """Whether the disk (or the user's share of it) is full. The libraries written in Rust,
    safetensors and tokenizers, raise errors of their own and give the number in words only."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)


def _speaks() -> bool:
    """Whether this process is to tell the error: of several with the same trouble only the first.

    The launcher (torchrun, ``accelerate launch``) gives each process a folder of its own for error
    files; the folder above it is common to them. Whoever makes the file there speaks.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not own or own == os.devnull:
        return True
    try:
        (Path(own).parent.parent / "lutqat_error").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better twice than not at all
        return True
    return True


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a :class:`LutqatError` or a full disk into one line on stderr and its exit code.

    Every face (stage or command) wraps its work in this; anything else keeps its traceback,
    because it is a defect of ours and not of the input.
    """
    try:
        yield
    except LutqatError as error:
        if _speaks():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if not _is_disk_full(error):
            raise
        name = error.filename if isinstance(error, OSError) else None
        where = f" while writing {name}" if name else ""
        if _speaks():
            print(
                f"error: no space left on the disk{where}; free some space and run the same "
                "command again, finished work is kept",
                file=sys.stderr,
            )
        raise SystemExit(DISK_FULL_EXIT_CODE) from None
