"""Running a command inside the test's process."""

from __future__ import annotations

from dataclasses import dataclass

from typer.testing import CliRunner

from lib.cli.main import app


@dataclass
class Outcome:
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    def refused_with(self, code: int, text: str) -> None:
        """One line on stderr that starts with ``error:`` and holds ``text``."""
        assert self.code == code, self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert text in lines[0]


def lutqat(*args: object, typed: str = "") -> Outcome:
    """The outcome of ``lutqat ARGS`` with ``typed`` as standard input."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)
