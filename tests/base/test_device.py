"""Devices by name, and what products are computed in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib.base.device import product_type, resolve_device
from lib.base.errors import ParamsError

CPU = torch.device("cpu")


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cuda", "mps", "cpu")
    with pytest.raises(ParamsError, match="'gpu' is unknown"):
        resolve_device("gpu")
    with pytest.raises(ParamsError, match="malformed"):
        resolve_device("cpu:x")


@pytest.mark.parametrize(
    ("instructions", "found"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),  # an architecture that names its instructions otherwise
    ],
)
def test_auto_takes_what_is_fast_here(
    instructions: dict[str, Any], found: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert product_type("auto", CPU) is found
    assert product_type("fp32", CPU) is torch.float32
    assert product_type("bf16", CPU) is torch.bfloat16
    assert product_type("fp16", CPU) is torch.float16
    assert product_type("auto", torch.device("mps")) is torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_cuda(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(including_emulation: bool) -> bool:
        assert not including_emulation
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    wanted = torch.bfloat16 if supported else torch.float32
    assert product_type("auto", torch.device("cuda")) is wanted
