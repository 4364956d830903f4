"""Merging adapters into indices: what arrives is counted rightly, and too little is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lib.base.errors import GateError, InputError
from lib.model.adapter import adapter_layers, add_adapters, change_of, lora_config
from lib.model.linear import LutLinear
from lib.model.surgery import quantized_layers
from lib.quant.spec import ScaleForm
from lib.recover.merge import Moved, check_arrived, merge_adapters, overall
from tests.export.snapped_models import snapped
from tests.tiny_models import quantized

TARGETS = ["q_proj", "down_proj"]
FORMS = list(ScaleForm)


def adapted(share: float, **changes: Any) -> PreTrainedModel:
    """A snapped model with adapters whose change is ``share`` of |W_q|, layer by layer."""
    model = snapped(**changes)
    add_adapters(model, lora_config(8, 8.0, 0.0, TARGETS))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            base: Any = layer.get_base_layer()
            b = layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape, generator=generator))
            b.mul_(share * base.dequantized().norm() / change_of(layer).norm())
    return model


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: layer.dequantized() for name, layer in quantized_layers(model).items()}


def wanted(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """W_q + (alpha / r) B A of every layer with an adapter."""
    found = {}
    for name, layer in adapter_layers(model).items():
        base: Any = layer.get_base_layer()
        found[name] = base.dequantized() + change_of(layer)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lut_size", [4, 16])
def test_indices_are_the_nearest_and_the_figures_are_those(form: ScaleForm, lut_size: int) -> None:
    model = adapted(0.5, lut_size=lut_size, scale=form)
    before, aim = weights(snapped(lut_size=lut_size, scale=form)), wanted(model)
    rows = merge_adapters(model, refit_scales=False)
    assert rows.keys() == aim.keys() and len(rows) == 4
    for name, row in rows.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LutLinear) and layer.weight is None
        a, b = layer.factors()
        scale, levels = a @ b, layer.levels()
        distances = (aim[name][..., None] - scale[..., None] * levels).abs()  # of every level
        chosen = distances.gather(2, layer.indices.long()[..., None]).squeeze(2)
        near = 2**-10 * scale.abs()  # rounding finds levels before they were rounded to FP16
        assert (chosen <= distances.amin(dim=2) + near).all()
        change, real = aim[name] - before[name], layer.dequantized() - before[name]
        assert row.weights == real.numel()
        assert row.moved == int((real != 0).sum())
        assert row.share == pytest.approx(
            float((real * change).sum() / change.square().sum()), rel=1e-3
        )
        error = (layer.dequantized() - aim[name]).square().sum() / change.square().sum()
        assert row.error == pytest.approx(float(error), rel=1e-3)
    untouched = quantized_layers(model).keys() - rows.keys()
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_at_two_bits_a_small_change_does_not_arrive() -> None:
    rows = merge_adapters(adapted(0.02, lut_size=4), refit_scales=False)
    total = overall(rows)
    assert total.share < 0.5 and total.moved < 0.05 * total.weights
    with pytest.raises(GateError, match=r"keep the adapter separate, or use --refit-scales"):
        check_arrived(total, refit_scales=False)


@pytest.mark.parametrize(("share", "lut_size"), [(1.0, 4), (0.1, 256)])
def test_a_large_change_or_eight_bits_arrive(share: float, lut_size: int) -> None:
    total = overall(merge_adapters(adapted(share, lut_size=lut_size), refit_scales=False))
    check_arrived(total, refit_scales=False)
    assert total.error < 1 and total.moved > 0.2 * total.weights


@pytest.mark.parametrize("form", FORMS)
def test_refitted_scales_come_nearer(form: ScaleForm) -> None:
    changes = {"lut_size": 4, "scale": form}
    plain = overall(merge_adapters(adapted(0.5, **changes), refit_scales=False))
    model = adapted(0.5, **changes)
    refitted = overall(merge_adapters(model, refit_scales=True))
    check_arrived(refitted, refit_scales=True)
    assert refitted.error < plain.error
    for layer in quantized_layers(model).values():
        for parameter in layer.parameters():  # still snapped: FP16 holds it
            assert torch.equal(parameter.half().float(), parameter)


def test_refitting_refuses_what_fp16_swallows() -> None:
    total = overall(merge_adapters(adapted(1e-6, lut_size=4), refit_scales=True))
    with pytest.raises(GateError, match="times as far .* keep the adapter separate"):
        check_arrived(total, refit_scales=True)


def test_nothing_to_merge() -> None:
    model = snapped()
    add_adapters(model, lora_config(4, 8.0, 0.0, TARGETS))  # untrained
    total = overall(merge_adapters(model, refit_scales=False))
    for refit in (False, True):
        with pytest.raises(GateError, match="changes nothing"):
            check_arrived(total, refit_scales=refit)


def test_half_is_enough() -> None:
    values = {"weights": 10, "moved": 1, "wanted": 4.0, "missed": 3.9}
    check_arrived(Moved(along=2.0, **values), refit_scales=False)
    with pytest.raises(GateError, match=r"49\.9% .*1 of 10 move"):
        check_arrived(Moved(along=1.996, **values), refit_scales=False)


def test_layers_with_masters_are_not_merged_into() -> None:
    model = quantized()
    add_adapters(model, lora_config(4, 8.0, 0.0, TARGETS))
    with pytest.raises(InputError, match="q_proj is not snapped"):
        merge_adapters(model, refit_scales=False)
