"""What counts as an RMSNorm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lib.model.norms import rms_gain

WEIGHT = torch.linspace(-0.5, 0.5, 16)


@pytest.mark.parametrize(
    ("family", "offset"), [(LlamaRMSNorm, 0.0), (Qwen3RMSNorm, 0.0), (GemmaRMSNorm, 1.0)]
)
def test_gain_and_eps_by_behaviour(family: type[nn.Module], offset: float) -> None:
    norm = family(16, eps=1e-3)
    norm.weight.data.copy_(WEIGHT)
    found = rms_gain(norm)
    assert found is not None
    gain, eps = found
    assert eps == 1e-3
    assert torch.equal(gain, WEIGHT + offset)
    gain.zero_()  # a copy
    assert norm.weight.any()


class _Other(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.abs().mean(-1, keepdim=True)


@pytest.mark.parametrize("module", [_Other(), nn.LayerNorm(16), nn.Linear(16, 4), nn.Identity()])
def test_others_are_none(module: nn.Module) -> None:
    assert rms_gain(module) is None
