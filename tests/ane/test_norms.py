"""The prescaled norm against the plain one, and which modules count as an RMSNorm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib.ane.emulate import Fp16Emulation
from lib.ane.norms import PrescaledRMSNorm, prescale_norms
from tests.ane.tiny import snapped_model, token_sequences


def _plain(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * gain


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 300.0, 24500.0])
def test_equals_the_plain_norm_at_every_size(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator) * size
    gain = torch.randn(32, generator=generator)
    norm = PrescaledRMSNorm(gain, 1e-5)
    expected = _plain(x.double(), gain.double(), 1e-5)
    assert torch.allclose(norm(x).double(), expected, rtol=1e-5, atol=1e-9)
    assert norm.peak == pytest.approx(float(x.abs().max()))


def test_survives_fp16_where_the_plain_norm_is_silently_zero() -> None:
    x = torch.linspace(-2000.0, 2000.0, 32)[None].half().float()
    gain = torch.ones(32)
    norm = PrescaledRMSNorm(gain, 1e-5)
    expected = _plain(x, gain, 1e-5)
    with Fp16Emulation(norm) as emulation:
        good = norm(x)
    with Fp16Emulation(nn.Identity()):
        silent = _plain(x, gain, 1e-5)
    assert torch.allclose(good, expected, rtol=5e-3)
    assert not any(record.overflows for record in emulation.records.values())
    assert torch.isfinite(silent).all()
    assert (silent == 0).all()


def test_zero_input_gives_zero() -> None:
    with Fp16Emulation(nn.Identity()):
        assert (PrescaledRMSNorm(torch.ones(8), 1e-6)(torch.zeros(2, 8)) == 0).all()


@pytest.mark.parametrize(("kind", "count"), [("llama", 5), ("qwen3", 9)])
def test_replaces_every_norm_of_a_model(kind: str, count: int) -> None:
    model = snapped_model(kind)
    ids = token_sequences()[0][None]
    with torch.no_grad():
        before = model(ids).logits
        norms = prescale_norms(model)
        after = model(ids).logits
    assert len(norms) == count  # qwen3 also has q_norm and k_norm
    assert torch.allclose(after, before, atol=1e-4)


class _OffsetNorm(nn.Module):
    """Gemma's: the stored weight is the gain less one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 16))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return _plain(x, 1 + self.weight, self.eps)


def test_gain_is_found_by_behaviour() -> None:
    model = nn.Sequential(_OffsetNorm(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(3, 16)
    before = model[0](x)
    assert list(prescale_norms(model)) == ["0"]
    assert torch.allclose(model[0](x), before, atol=1e-5)
    assert isinstance(model[1], nn.LayerNorm)
