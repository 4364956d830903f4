"""Compiling is an option that may fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.base import compiled
from lib.base.compiled import fused


def test_a_failing_compiler_is_reported_once_and_does_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts: list[int] = []

    def broken(*_args: object) -> None:
        attempts.append(1)
        raise torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler")

    def double(x: Tensor) -> Tensor:
        return 2 * x

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: broken)
    call = compiled._compiled(double)
    assert torch.equal(call(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(call(torch.ones(2)), torch.full((2,), 2.0))
    assert len(attempts) == 1
    assert "not compiling double (no C++ compiler); slower" in capsys.readouterr().err


def test_small_tensors_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(_function: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(compiled, "_compiled", compiler)
    assert torch.equal(fused(torch.add, torch.ones(3), 1, worth=4), torch.full((3,), 2.0))
    with pytest.raises(AssertionError):
        fused(torch.add, torch.ones(4), 1, worth=4)
