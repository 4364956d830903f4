"""The command `lutqat`, for people. The pipeline itself is run with `dvc repro`.

Modules that a command needs are imported when it runs: `lutqat --help` takes no second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import typer

from lib.base.errors import exit_on_error
from lib.cli.cache import cache_import, cache_info, cache_verify
from lib.cli.convert import convert_checkpoint
from lib.cli.generate import chat, generate
from lib.cli.inspect import inspect
from lib.cli.mac_check import mac_check
from lib.cli.merge import merge_adapter
from lib.cli.plot import plot
from lib.cli.profile import profile
from lib.cli.report import report

app = typer.Typer(
    name="lutqat",
    help="Look at, talk to and convert models of the lutqat pipeline.\n\n"
    "Training is `dvc repro`; `lutqat profile NAME` chooses what it trains. "
    "`lutqat COMMAND --help` shows an example of each command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with user errors as one line and an exit code."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        with exit_on_error():
            command(*args, **options)

    return run


for _command, _name in (
    (generate, "generate"),
    (chat, "chat"),
    (inspect, "inspect"),
    (profile, "profile"),
    (convert_checkpoint, "convert-checkpoint"),
    (merge_adapter, "merge-adapter"),
    (plot, "plot"),
    (report, "report"),
    (mac_check, "mac-check"),
):
    app.command(_name, no_args_is_help=_command not in (profile, report))(_guarded(_command))

_cache = typer.Typer(help="Look at a teacher cache, or import one.", no_args_is_help=True)
_cache.command("info", no_args_is_help=True)(_guarded(cache_info))
_cache.command("verify", no_args_is_help=True)(_guarded(cache_verify))
_cache.command("import", no_args_is_help=True)(_guarded(cache_import))
app.add_typer(_cache, name="cache")


if __name__ == "__main__":
    app()
