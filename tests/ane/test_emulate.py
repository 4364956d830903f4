"""The emulation against true FP16 arithmetic, its log and its overflow rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lib.ane.emulate import Fp16Emulation
from lib.quant.fp16 import is_fp16_exact
from tests.ane.tiny import snapped_model, token_sequences


def _halves(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).half()


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "chain": lambda x, y: (x * y + x) * y - x,
    "root": lambda x, y: (x * x).sqrt() + y,
    "in place": lambda x, y: x.clone().add_(y).mul_(y),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_equals_true_half_precision(name: str) -> None:
    x, y = _halves(64, 33), _halves(64, 33, seed=1)
    function = ELEMENTWISE[name]
    with Fp16Emulation(nn.Identity()):
        emulated = function(x.float(), y.float())
    assert torch.equal(emulated, function(x, y).float())
    if name in ("chain", "in place"):  # several operations: one rounding at the end is not enough
        assert not torch.equal(function(x.float(), y.float()).half().float(), emulated)


def test_matmul_is_within_one_rounding_of_the_exact_product() -> None:
    x, y = _halves(17, 200), _halves(200, 9, seed=1)
    exact = x.double() @ y.double()
    with Fp16Emulation(nn.Identity()):
        emulated = x.float() @ y.float()
    spacing = exact.abs().clamp_min(2.0**-14).log2().floor().exp2() * 2.0**-10
    assert is_fp16_exact(emulated)
    # half a spacing for the rounding, and a little for the float32 sum
    assert ((emulated - exact).abs() <= 0.51 * spacing).all()
    assert not torch.equal(emulated, exact.float())


def test_results_are_rounded_and_views_share_memory() -> None:
    x = _halves(4, 6).float()
    with Fp16Emulation(nn.Identity()):
        parts = (x * 1.1).split(3, dim=1)
        view = x.view(2, 12)
        low, high = torch.aminmax(x * 0.3)
    assert all(is_fp16_exact(part) for part in (*parts, low, high))
    assert view.data_ptr() == x.data_ptr()


def test_integers_and_booleans_pass() -> None:
    with Fp16Emulation(nn.Identity()):
        assert (torch.arange(70000) + 1)[-1] == 70000
        assert bool((torch.arange(3) > 1).any())


def test_overflow_is_infinite_and_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[1][0].weight.mul_(30000.0)
    with torch.no_grad(), Fp16Emulation(model) as emulation:
        result = model(torch.ones(2, 4))
    assert torch.isinf(result).all()
    overflowed = [record for record in emulation.records.values() if record.overflows]
    assert [(r.module, r.op) for r in overflowed] == [("1.0", "addmm")]
    assert overflowed[0].max_abs == 4 * 5 * 30000 + 1
    assert emulation.non_finite_from == "1.0"


def test_largest_value_that_does_not_overflow() -> None:
    x = torch.tensor([65504.0])
    with Fp16Emulation(nn.Identity()) as emulation:
        fits, passes = x + 15.0, x + 16.0
    assert fits.item() == 65504.0
    assert torch.isinf(passes).all()
    assert emulation.records["", "add"].overflows == 1


def test_constants_are_rounded_but_not_logged() -> None:
    mask = torch.full((3,), -1e4)
    with Fp16Emulation(nn.Identity(), constants=[mask]) as emulation:
        result = torch.ones(3) * 0.3 + mask[:3]
    assert is_fp16_exact(result)
    assert ("", "add") not in emulation.records
    assert ("", "mul") in emulation.records


def test_modules_are_named_and_hooks_removed() -> None:
    model = snapped_model()
    ids = token_sequences()[0][None]
    with torch.no_grad(), Fp16Emulation(model) as emulation:
        emulated = model(ids).logits
    modules = {record.module for record in emulation.records.values()}
    assert {"model.embed_tokens", "model.layers.1", "model.layers.0.mlp.down_proj"} <= modules
    assert is_fp16_exact(emulated)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert not is_fp16_exact(model(ids).logits)


def test_hooks_are_removed_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError), Fp16Emulation(model):
        model(torch.ones(2, 5))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rotary_tables_are_constants() -> None:
    """An angle computed in FP16 would be off by up to 0.03 at position 100."""
    model = snapped_model()
    rotary = model.get_submodule("model.rotary_emb")
    positions = torch.arange(100)[None]
    x = torch.zeros(1, 100, 16)
    expected = [table.half().float() for table in rotary(x, positions)]
    with torch.no_grad(), Fp16Emulation(model):
        tables = rotary(x, positions)
    assert all(torch.equal(a, b) for a, b in zip(tables, expected, strict=True))
