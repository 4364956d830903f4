"""The product with a quantized weight, its gradients against autograd on the plain expression."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lib.quant.codebook import assign, make_codebook, safe_ratio
from lib.quant.spec import Codebook
from lib.quant.ste import dequantized_weight, lookup, quantized_linear, round_fp16

OUT, IN, RANK, LUT = 10, 14, 3, 8


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(OUT, IN, generator=generator),
        "a": torch.randn(OUT, RANK, generator=generator),  # S has both signs
        "b": torch.randn(RANK, IN, generator=generator),
        "lut": make_codebook(Codebook.BALANCED, LUT) / 4,  # equally spaced, exact in FP16
    }


def slow(weight: Tensor, a: Tensor, b: Tensor, lut: Tensor) -> Tensor:
    """The equation, idx = argmin, with a straight-through weight: W_q + (W - W.detach())."""
    scale = a @ b
    ratio = (weight / scale).detach()
    indices = (ratio[..., None] - lut.detach()).abs().argmin(dim=-1)
    return lut[indices] * scale + (weight - weight.detach())


def searched(v: dict[str, Tensor], *, affine: bool = False) -> Tensor:
    """W_q ``[out, in]``, differentiable: the product with the identity."""
    factors = (v["a"], v["b"], v["lut"])
    return quantized_linear(
        torch.eye(IN), *factors, indices=room(), weight=v["weight"], affine=affine
    ).T


def room() -> Tensor:
    """Where found indices go; what is there before does not matter."""
    return torch.full((OUT, IN), 77, dtype=torch.uint8)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "trained",
    [c for n in range(1, 5) for c in itertools.combinations(("weight", "a", "b", "lut"), n)],
    ids="+".join,
)
def test_value_and_gradients_while_indices_are_searched(
    trained: tuple[str, ...], affine: bool
) -> None:
    upstream = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9))
    fast_in, slow_in = tensors(), tensors()
    for name in trained:
        fast_in[name].requires_grad_(True)
        slow_in[name].requires_grad_(True)
    fast = searched(fast_in, affine=affine)
    reference = slow(**slow_in)
    assert torch.allclose(fast, reference, atol=1e-6)
    (fast * upstream).sum().backward()
    (reference * upstream).sum().backward()
    for name, value in fast_in.items():
        if name not in trained:
            assert value.grad is None
            continue
        expected = slow_in[name].grad
        assert value.grad is not None and expected is not None and expected.abs().max() > 0
        assert torch.allclose(value.grad, expected, rtol=1e-4, atol=1e-5), name
    if "weight" in trained:
        assert torch.equal(fast_in["weight"].grad, upstream)  # straight through, bit for bit


def test_gradients_with_given_indices() -> None:
    values = tensors()
    indices = torch.randint(
        0, LUT, (OUT, IN), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    doubles = [values[name].double().requires_grad_(True) for name in ("a", "b", "lut")]

    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(2)).double()
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(3)).double()
    leaves = [x.requires_grad_(True), bias.requires_grad_(True)]

    def function(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, lut: Tensor) -> Tensor:
        return quantized_linear(x, a, b, lut, indices=indices, bias=bias)

    assert torch.autograd.gradcheck(function, [*leaves, *doubles])


def test_what_is_kept_for_backward() -> None:
    """Of the size of the weight only the indices, one byte each."""
    v = {name: value.requires_grad_(True) for name, value in tensors().items()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, IN)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantized_linear(x, v["a"], v["b"], v["lut"], indices=room(), weight=v["weight"])
    large = [tensor for tensor in kept if tensor.numel() >= OUT * IN]
    assert [tensor.dtype for tensor in large] == [torch.uint8]


def test_zero_scales_give_zero_weights() -> None:
    values = tensors()
    values["a"][3] = 0.0
    values["weight"][3, :4] = 0.0
    fast = searched(values)
    assert fast.isfinite().all() and (fast[3] == 0).all()


def test_found_indices_are_written_where_they_stay_until_backward() -> None:
    v = {name: value.requires_grad_(True) for name, value in tensors().items()}
    indices = room()
    eye = torch.eye(IN)
    y = quantized_linear(eye, v["a"], v["b"], v["lut"], indices=indices, weight=v["weight"])
    with torch.no_grad():
        ratio = safe_ratio(v["weight"], v["a"] @ v["b"])
    assert torch.equal(indices, assign(ratio, v["lut"].detach(), affine=False))
    indices[0, 0] ^= 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_round_fp16_rounds_and_passes_gradients() -> None:
    x = torch.tensor([1 / 3, -2e-8, 65519.0, 65521.0, -1e6, 6e-8], requires_grad=True)
    y = round_fp16(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, x.detach().half().float())
    assert y[2] == 65504 and y[3] == float("inf") and y[4] == float("-inf")
    upstream = torch.arange(6.0)
    y.backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream)


def test_autocast_touches_the_product_alone() -> None:
    v = {name: value.requires_grad_(True) for name, value in tensors().items()}
    a, b, lut = (round_fp16(v[name]) for name in ("a", "b", "lut"))
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(4))
    upstream = torch.randn(6, OUT, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized_linear(x, a, b, lut, indices=room(), weight=v["weight"])
    assert y.dtype == torch.bfloat16
    w_q = searched({"a": a, "b": b, "lut": lut, "weight": v["weight"]}).detach()
    assert torch.equal(y, x.bfloat16() @ w_q.bfloat16().T)  # W_q was exact until here
    y.backward(upstream.bfloat16())
    grad_w = (upstream.bfloat16().T @ x.bfloat16()).float()
    grad_scale = grad_w * (w_q / (a @ b)).detach()
    assert v["weight"].grad is not None and torch.equal(v["weight"].grad, grad_w)
    assert v["a"].grad is not None and v["a"].grad.dtype == torch.float32
    assert torch.allclose(v["a"].grad, grad_scale @ b.detach().T, rtol=1e-4, atol=1e-5)


def test_lookup() -> None:
    indices = torch.tensor([[0, 3], [255, 1]], dtype=torch.uint8)
    lut = torch.arange(256.0) * 2
    assert lookup(lut, indices).tolist() == [[0.0, 6.0], [510.0, 2.0]]


@pytest.mark.parametrize("kind", [Codebook.UNIFORM, Codebook.BALANCED])
def test_given_indices_and_searched_ones_agree(kind: Codebook) -> None:
    v = tensors()
    lut = make_codebook(kind, LUT)
    indices = assign(safe_ratio(v["weight"], v["a"] @ v["b"]), lut, affine=True)
    given = quantized_linear(torch.eye(IN), v["a"], v["b"], lut, indices=indices).T
    assert torch.equal(given, searched({**v, "lut": lut}, affine=True))
    assert torch.equal(dequantized_weight(v["a"], v["b"], lut, indices), given)
