"""Products summed in FP16, against loops over true half precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.ane.emulate import Fp16Emulation
from lib.ane.products import Mode

INPUTS = 16


def _halves(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).half().float()


def _slow(left: Tensor, right: Tensor) -> Tensor:
    """Chunk after chunk, each sum rounded; a chunk itself is exact enough in float64."""
    total = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=torch.half)
    for start in range(0, left.shape[-1], INPUTS):
        chunk = slice(start, start + INPUTS)
        part = left.double()[..., chunk] @ right.double()[..., chunk, :]
        total = total + part.half()
    return total.float()


def _emulated(function: Callable[[], Tensor], mode: Mode = Mode.PARTIAL) -> Tensor:
    with torch.no_grad(), Fp16Emulation(nn.Identity(), mode=mode, partial_inputs=INPUTS):
        return function()


X, Y = _halves(7, 50), _halves(50, 9, seed=1)  # 50: the last chunk is short
BATCH, OTHERS = _halves(3, 5, 40, seed=2), _halves(3, 40, 6, seed=3)
BIAS = _halves(9, seed=4)
IMAGE, KERNEL = _halves(1, 50, 1, 7, seed=5), _halves(9, 50, 1, 1, seed=6)

CASES: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
    "mm": (lambda: X @ Y, _slow(X, Y)),
    "bmm": (lambda: BATCH @ OTHERS, _slow(BATCH, OTHERS)),
    "linear with bias": (
        lambda: F.linear(X, Y.T, BIAS),
        (_slow(X, Y).half() + BIAS.half()).float(),
    ),
    "baddbmm": (
        lambda: torch.baddbmm(BATCH[:, :, :6], BATCH, OTHERS),
        (_slow(BATCH, OTHERS).half() + BATCH[:, :, :6].half()).float(),
    ),
    "convolution": (
        lambda: F.conv2d(IMAGE, KERNEL, BIAS),
        (_slow(KERNEL[:, :, 0, 0], IMAGE[0, :, 0]).half() + BIAS[:, None].half()).float()[
            None, :, None
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_partial_sums_are_rounded(name: str) -> None:
    function, expected = CASES[name]
    result = _emulated(function)
    # a chunk's float32 sum may fall on the other side of a tie
    assert (result != expected).float().mean() < 0.02
    assert torch.allclose(result, expected, rtol=2e-3, atol=2e-3)
    assert (_emulated(function, Mode.WIDE) != expected).float().mean() > 0.1


def test_one_chunk_is_the_wide_product() -> None:
    short = _halves(4, INPUTS), _halves(INPUTS, 3, seed=1)
    assert torch.equal(
        _emulated(lambda: short[0] @ short[1]), _emulated(lambda: short[0] @ short[1], Mode.WIDE)
    )


def test_grouped_convolution_is_computed_whole() -> None:
    weight = _halves(50, 1, 1, 1, seed=7)
    results = [
        _emulated(lambda: F.conv2d(IMAGE, weight, groups=50), mode)
        for mode in (Mode.PARTIAL, Mode.WIDE)
    ]
    assert torch.equal(*results)


def test_bounded_products_are_infinite_above_the_limit() -> None:
    left = torch.tensor([[32752.0], [32768.0], [-40000.0]])
    one = torch.ones(1, 1)
    with Fp16Emulation(nn.Identity(), mode=Mode.BOUNDED) as emulation:
        products = left @ one
        sums = left + 0.0 * one  # no product: not bounded
    inf = float("inf")
    assert products.flatten().tolist() == [32752.0, inf, -inf]
    assert torch.isfinite(sums).all()
    assert emulation.records["", "mm"].overflows == 1
    assert emulation.records["", "add"].overflows == 0
    assert _emulated(lambda: left @ one, Mode.WIDE).isfinite().all()


def test_bounded_is_wide_below_the_limit() -> None:
    assert torch.equal(_emulated(lambda: X @ Y, Mode.BOUNDED), _emulated(lambda: X @ Y, Mode.WIDE))
