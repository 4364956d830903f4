from __future__ import annotations

import io
import sys

import pytest

from lib.base.progress import track


def test_a_pipe_gets_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "letters: 3 to do"
    assert last.startswith("letters: 3 done in ")


def test_a_failure_is_not_reported_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(item: int) -> int:
        raise RuntimeError(item)

    with pytest.raises(RuntimeError):
        list(track(map(fail, [1, 2]), 2, "work"))
    assert "done" not in capsys.readouterr().err


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(range(4), 4, "numbers")) == [0, 1, 2, 3]
    assert "numbers" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert "to do" not in terminal.getvalue()
