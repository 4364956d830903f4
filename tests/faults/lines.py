"""What a user reads when something is refused."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

from lib.base.errors import exit_on_error


def said(work: Callable[[], Any]) -> tuple[Any, str, int]:
    """What ``work`` returned, what was written to stderr, and the exit code; defects of ours are
    raised as they are."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text), exit_on_error():
            return work(), text.getvalue(), 0
    except SystemExit as stop:
        return None, text.getvalue(), int(stop.code or 0)
