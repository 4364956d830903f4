"""E[x^2] against activations collected by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.base.errors import NonFiniteError
from lib.model import calibrate
from lib.model.calibrate import input_moments, quantize_calibrated
from lib.model.feedback import feed_back
from lib.model.linear import LutLinear
from lib.model.surgery import projections, quantized_layers
from lib.quant.spec import ModelSpec
from tests.tiny_models import linear_spec, model_spec, quantized, random_rows, tiny_model

ROWS = random_rows(11, "train", 3)
IDS, LENGTHS = torch.from_numpy(ROWS.input_ids).long(), torch.from_numpy(ROWS.lengths)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_mean_square_over_real_tokens(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BATCH", batch)
    model = tiny_model()
    found = input_moments(model, IDS, LENGTHS, full=False)
    assert found.keys() == projections(model).keys()
    inputs: list[Tensor] = []
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    down.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for ids, length in zip(IDS, LENGTHS, strict=True):
            model(input_ids=ids[None, :length])  # no padding at all
    slow = torch.cat([x[0] for x in inputs]).square().mean(dim=0)
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], slow, rtol=1e-4)


def test_what_the_padding_holds_does_not_matter() -> None:
    other = IDS.clone()
    other[torch.arange(IDS.shape[1]) >= LENGTHS[:, None]] = 5
    one, two = (input_moments(tiny_model(), ids, LENGTHS, full=False) for ids in (IDS, other))
    assert not torch.equal(IDS, other)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_quantized_models_too_and_no_hook_is_left() -> None:
    model = quantized()
    importance = input_moments(model, IDS, LENGTHS, full=False)
    assert all((value > 0).any() and value.isfinite().all() for value in importance.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_whose_input_is_not_finite_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        input_moments(model, IDS, LENGTHS, full=False)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_all_products_over_real_tokens(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BATCH", batch)
    model = tiny_model()
    found = input_moments(model, IDS, LENGTHS, full=True)
    assert found.keys() == projections(model).keys()
    inputs: dict[str, list[Tensor]] = {}
    for name, module in projections(model).items():
        inputs[name] = []
        module.register_forward_pre_hook(lambda _, args, n=name: inputs[n].append(args[0]))
    with torch.no_grad():
        for ids, length in zip(IDS, LENGTHS, strict=True):
            model(input_ids=ids[None, :length])
    for name, seen in inputs.items():
        x = torch.cat([part[0] for part in seen])
        assert torch.allclose(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_layers_with_the_same_input_share_their_moments() -> None:
    found = input_moments(tiny_model(), IDS, LENGTHS, full=True)
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert found[attention + "q_proj"] is found[attention + "v_proj"]
    assert found[mlp + "gate_proj"] is found[mlp + "up_proj"]
    others = [attention + "q_proj", attention + "o_proj", mlp + "gate_proj", mlp + "down_proj"]
    assert len({id(found[name]) for name in [*others, "model.layers.0.self_attn.q_proj"]}) == 5


@pytest.mark.parametrize(
    "changes", [{"feedback": True}, {"refit_steps": 2}, {"feedback": True, "refit_steps": 2}]
)
def test_starts_are_given_what_they_need(changes: dict[str, Any]) -> None:
    linear = linear_spec(lut_size=4, **changes)
    spec = ModelSpec(mlp=linear, attention=None)
    model, teacher = tiny_model(), tiny_model()
    quantize_calibrated(model, spec, lambda: (IDS[:4], LENGTHS[:4]))
    moments = input_moments(teacher, IDS[:4], LENGTHS[:4], full=linear.feedback)
    for name, layer in quantized_layers(model).items():
        weight = teacher.get_submodule(name).weight
        alone = LutLinear.from_weight(weight, None, linear, name, moments[name])
        feed_back({name: alone}, moments)
        assert torch.equal(layer.dequantized(), alone.dequantized())


def test_max_abs_asks_for_no_text() -> None:
    def text() -> tuple[Tensor, Tensor]:
        raise AssertionError

    quantize_calibrated(tiny_model(), model_spec(), text)
