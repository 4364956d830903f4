"""The way into a stage: its folders from the command line, its errors as one line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from lib.base.errors import InputError, exit_on_error
from lib.base.locks import sole_writer


def run_stage(main: Callable[..., None]) -> None:
    """Call ``main`` with the command line's paths; ``--help`` prints its module's docstring.

    The last path is the folder that the stage writes: a second run has to wait for the first.

    Exits with one line and a code if the number of paths is wrong, or on any
    :class:`lib.base.errors.LutqatError`.
    """
    arguments = sys.argv[1:]
    names = [name.upper() for name in inspect.signature(main).parameters]
    if "--help" in arguments or "-h" in arguments:
        print((sys.modules[main.__module__].__doc__ or "").strip())
        return
    with exit_on_error():
        if len(arguments) != len(names):
            raise InputError(
                f"{len(arguments)} arguments were given instead of {len(names)}: "
                f"{' '.join(names)}; "
                "`dvc repro` gives them, --help explains them"
            )
        paths = [Path(argument) for argument in arguments]
        with sole_writer(Path(inspect.getfile(main)).stem, paths[-1]):
            main(*paths)
