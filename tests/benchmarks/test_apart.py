"""Calls in a process of their own."""

from __future__ import annotations

import math
import multiprocessing
import os
import time

import pytest

from benchmarks.apart import apart


def test_the_result_comes_back_from_another_process() -> None:
    assert apart(math.hypot, 3.0, 4.0, limit=600) == 5.0
    assert apart(os.getpid) != os.getpid()
    assert not multiprocessing.active_children()


def test_no_result_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TimeoutError, match=r"no result after 0\.1 s"):
        apart(time.sleep, 3600, limit=0.1)
    with pytest.raises(ChildProcessError, match="its process died"):
        apart(os._exit, 3)
    with pytest.raises(ChildProcessError, match="its process died"):
        apart(math.sqrt, -1.0)
    assert "math domain error" in capfd.readouterr().err
    assert not multiprocessing.active_children()
