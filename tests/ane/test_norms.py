"""The deployed norms against the equation, and which modules are replaced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib.ane.emulate import Fp16Emulation
from lib.ane.factored import restore
from lib.ane.norms import NormForm, PlainRMSNorm, PrescaledRMSNorm, deploy_norms
from tests.ane.tiny import snapped_model, token_sequences


def _plain(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * gain


@pytest.mark.parametrize("form", [PrescaledRMSNorm, PlainRMSNorm])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0, 24500.0])
def test_equals_the_equation_at_every_size(form: type[nn.Module], size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator) * size
    gain = torch.randn(32, generator=generator)
    eps = 2.0**-14  # which FP16 holds
    norm = form(gain, eps)
    expected = _plain(x.double(), gain.double(), eps)
    assert torch.allclose(norm(x).double(), expected, rtol=1e-5, atol=1e-9)


def test_prescaled_keeps_an_eps_that_fp16_does_not_hold() -> None:
    x = torch.full((1, 8), 1e-3)
    gain = torch.ones(8)
    expected = _plain(x.double(), gain.double(), 1e-8).float()
    assert torch.allclose(PrescaledRMSNorm(gain, 1e-8)(x), expected, rtol=1e-5)
    assert PlainRMSNorm(gain, 1e-8).eps == 0.0


def test_survives_fp16_where_the_plain_norm_is_silently_zero() -> None:
    x = torch.linspace(-2000.0, 2000.0, 32)[None].half().float()
    gain = torch.ones(32)
    norms = nn.ModuleDict(
        {"prescaled": PrescaledRMSNorm(gain, 1e-5), "plain": PlainRMSNorm(gain, 1e-5)}
    )
    with Fp16Emulation(norms, inputs_of=["plain"]) as emulation:
        good, silent = norms["prescaled"](x), norms["plain"](x)
    assert torch.allclose(good, _plain(x, gain, 1e-5), rtol=5e-3)
    assert torch.isfinite(silent).all()
    assert (silent == 0).all()
    overflowed = [(r.module, r.op) for r in emulation.records.values() if r.overflows]
    assert overflowed == [("plain", "pow")]
    assert emulation.input_peaks == {"plain": 2000.0}


def test_zero_input_gives_zero() -> None:
    with Fp16Emulation(nn.Identity()):
        assert (PrescaledRMSNorm(torch.ones(8), 1e-6)(torch.zeros(2, 8)) == 0).all()


@pytest.mark.parametrize("form", NormForm)
@pytest.mark.parametrize(("kind", "count"), [("llama", 5), ("qwen3", 9)])
def test_replaces_every_norm_of_a_model(form: NormForm, kind: str, count: int) -> None:
    model = snapped_model(kind)
    ids = token_sequences()[0][None]
    with torch.no_grad():
        before = model(ids).logits
        originals = deploy_norms(model, form)
        after = model(ids).logits
        restore(model, originals)
        assert torch.equal(model(ids).logits, before)
    assert len(originals) == count  # qwen3 also has q_norm and k_norm
    assert torch.allclose(after, before, atol=1e-3)
    assert not torch.equal(after, before)
