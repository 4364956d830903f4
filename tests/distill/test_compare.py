"""Agreement against the definition, whatever the chunking."""

from __future__ import annotations

import math

import pytest
import torch

from lib.distill.compare import Agreement


def _logits(seed: int) -> torch.Tensor:
    return torch.randn(23, 50, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_equals_the_definition(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.distill.compare.ROWS_PER_CHUNK", rows)
    candidate, reference = _logits(0), _logits(1)
    p, q = reference.double().softmax(-1), candidate.double().softmax(-1)
    agreement = Agreement()
    agreement.add(candidate[:10], reference[:10])
    agreement.add(candidate[10:], reference[10:])
    assert agreement.positions == 23
    assert agreement.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert agreement.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_a_shift_of_all_logits_is_no_difference() -> None:
    agreement = Agreement()
    agreement.add(_logits(0) + 5, _logits(0))
    assert abs(agreement.kl) < 1e-5
    assert agreement.top1 == 1.0


def test_nan_is_not_hidden() -> None:
    candidate = _logits(0)
    candidate[3, 3] = math.nan
    agreement = Agreement()
    agreement.add(candidate, _logits(1))
    assert math.isnan(agreement.kl)
