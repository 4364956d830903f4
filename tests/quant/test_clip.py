"""The share of max-abs against outputs that are computed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.quant.clip import SHARES, clip_errors, with_best_range
from lib.quant.codebook import make_codebook
from lib.quant.scales import initial_factors
from lib.quant.spec import Codebook, ScaleForm
from tests.tiny_models import linear_spec


def _layer(outlier: float) -> tuple[Tensor, Tensor, Tensor]:
    """W ``[8, 16]`` with one large weight per output, S for max-abs, and inputs ``[50, 16]``."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 16, generator=generator)
    weight[:, 3] = outlier
    spec = linear_spec(scale=ScaleForm.CHANNEL, codebook=Codebook.BALANCED)
    a, b = initial_factors(weight, spec, 1.5)
    x = torch.randn(50, 16, generator=generator) * torch.rand(16, generator=generator)
    return weight, a @ b, x


@pytest.mark.parametrize("outlier", [1.0, 9.0])
def test_errors_are_those_of_the_outputs(outlier: float) -> None:
    weight, scale, x = _layer(outlier)
    lut = make_codebook(Codebook.BALANCED, 4)
    found = clip_errors(weight, scale, lut, x.T @ x / len(x), affine=True)
    for share, error in zip(SHARES, found, strict=True):
        slow = 0.0
        for row in range(8):
            for sample in x:
                missed = 0.0
                for j in range(16):
                    part = float(scale[row, j]) * share
                    value = min(lut.tolist(), key=lambda v: abs(float(weight[row, j]) / part - v))
                    missed += (float(weight[row, j]) - value * part) * float(sample[j])
                slow += missed**2 / len(x)
        assert error == pytest.approx(slow, rel=1e-3)


def test_an_unused_outlier_is_clipped_and_a_used_one_is_not() -> None:
    weight, _, x = _layer(9.0)
    spec = linear_spec(scale=ScaleForm.CHANNEL, codebook=Codebook.BALANCED, range=0.7)
    lut = make_codebook(Codebook.BALANCED, 4)
    shares = {}
    for use in (1e-3, 300.0):
        given = x.clone()
        given[:, 3] = x[:, 3] / x[:, 3].norm() * use
        moments = given.T @ given / len(given)
        shares[use] = with_best_range(weight, spec, lut, moments).range
    assert shares[1e-3] == min(SHARES)
    assert shares[300.0] == max(SHARES)
