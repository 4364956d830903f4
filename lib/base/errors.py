"""Errors meant for the user: one line each, with the value, what is allowed and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
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
MACHINE_EXIT_CODE = 11

_UNSAID = 0  # for libraries in C++ that say what failed but not why
_WRITE_FAILED = re.compile(
    r"PytorchStreamWriter failed writing|inline_container.* unexpected pos|file write failed"
    r"|\[MIL FileWriter\]: Un(known error.* writing|able to open)|iostream error"
)
_FULL = (_UNSAID, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TROUBLES = {
    errno.ENOSPC: ("no space left on the disk", "free some space"),
    errno.EDQUOT: ("no space left on the disk for this user (quota)", "free some space"),
    errno.EFBIG: (
        "no space left in a file: the file system or `ulimit -f` allows no larger one",
        "use another file system or limit",
    ),
    _UNSAID: ("no space left on the disk, it seems: a write failed", "free some space"),
    errno.EIO: ("the disk gave an input/output error", "check the disk and its connection"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EACCES: ("permission denied", "see who owns it"),
    errno.EPERM: ("operation not permitted", "see who owns it"),
    errno.EMFILE: ("too many open files", "raise `ulimit -n`"),
    errno.ENFILE: ("too many open files on this machine", "end some programs"),
    errno.EISDIR: ("a folder is where a file should be", "move it away"),
    errno.ENOTDIR: ("a file is where a folder should be", "move it away"),
    errno.ESTALE: ("a network file system lost a file", "check its connection"),
}
"""What the machine does to us: error number -> what happened, remedy."""


def trouble_of(error: BaseException) -> int | None:
    """The error number, if it is the machine's trouble and not a defect of ours.

    Libraries written in Rust, safetensors and tokenizers, raise errors of their own and give it in
    words only; those in C++, torch and coremltools, say no more than that a write failed.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = int(said[1]) if said else None
    if isinstance(error, RuntimeError) and _WRITE_FAILED.search(str(error)):
        number = _UNSAID
    return number if number in _TROUBLES else None


def _explain(number: int, name: object) -> str:
    """One line for trouble of the machine with the file ``name`` (None: not known)."""
    happened, remedy = _TROUBLES[number]
    doing = "while writing " if number in _FULL else "with "
    where = f" {doing}{name}" if name else ""
    return f"{happened}{where}; {remedy} and run the same command again, finished work is kept"


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
    """Turn a :class:`LutqatError`, or trouble with the disk, into one line on stderr and an exit
    code.

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
        number = trouble_of(error)
        if number is None:
            raise
        if _speaks():
            name = error.filename if isinstance(error, OSError) else None
            print(f"error: {_explain(number, name)}", file=sys.stderr)
        raise SystemExit(DISK_FULL_EXIT_CODE if number in _FULL else MACHINE_EXIT_CODE) from None
