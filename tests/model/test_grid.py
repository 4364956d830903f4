"""Masters on their grid: what is measured, pulled, put there and brought back."""

from __future__ import annotations

import math

import pytest
import torch

from lib.base.errors import MismatchError
from lib.model.grid import LayerGrid, fits, hardened
from lib.model.surgery import master_linear, quantized_layers
from lib.quant.spec import Codebook, ScaleForm
from lib.snap.snap import snap_model
from tests.tiny_models import logits_of, quantized, same, state_of

FORMS = [
    {"scale": ScaleForm.LOWRANK, "lut_size": 4},
    {"scale": ScaleForm.DIRECTIONAL, "lut_size": 16, "codebook": Codebook.BALANCED},
    {"scale": ScaleForm.GROUP, "lut_size": 4, "codebook": Codebook.KMEANS},
]
NAME = "model.layers.0.mlp.up_proj"


def grids_of(**changes: object) -> dict[str, LayerGrid]:
    layers = quantized_layers(quantized(**changes))
    return {name: LayerGrid(layer) for name, layer in layers.items()}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_figures_are_those_of_the_quantized_weight(form: dict[str, object]) -> None:
    """W_q as the forward pass has it, in float64."""
    grids = grids_of(**form)
    overall, each = fits(grids, 0.1)
    total, count = 0.0, 0
    for name, grid in grids.items():
        layer = grid.layer
        away = (grid.weight - layer.dequantized()).double()
        a, b = layer.factors()
        lut = layer.levels()
        spacing = float(lut[-1] - lut[0]) / (len(lut) - 1)
        steps = spacing * (a @ b).double().square().mean(dim=1, keepdim=True).sqrt()
        squares = (away / steps).square()
        assert each[name].distance == pytest.approx(float(squares.mean()), rel=1e-4)
        hits = ((away / steps).abs() <= 0.1).double().mean()
        assert each[name].hit_rate == pytest.approx(float(hits), abs=2e-3)
        total, count = total + float(squares.sum()), count + away.numel()
    assert overall.distance == pytest.approx(total / count, rel=1e-4)
    assert 0 < overall.hit_rate < 1 and 0 <= overall.sat_rate < 0.2


def test_clipped_weights_are_saturated() -> None:
    assert fits(grids_of(range=0.5), 0.05)[0].sat_rate > fits(grids_of(), 0.05)[0].sat_rate + 0.05


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_pull_divides_the_distance(form: dict[str, object]) -> None:
    grid = grids_of(**form)[NAME]
    before, indices = grid.sums(0.05), grid.layer.nearest_indices()
    after = grid.pull(torch.tensor(0.25))
    assert float(after) == pytest.approx(float(before[0]) / 1.25**2, rel=1e-4)
    assert float(grid.sums(0.05)[0]) == pytest.approx(float(after), rel=1e-4)
    assert torch.equal(grid.layer.nearest_indices(), indices)  # the model on its grid is the same


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_snapping_all_gives_the_quantized_weight_and_keeps_the_model(
    form: dict[str, object],
) -> None:
    model = quantized(**form)
    before = logits_of(model)
    for layer in quantized_layers(model).values():
        wanted = layer.dequantized()
        LayerGrid(layer).snap(math.inf)
        assert torch.equal(layer.weight, wanted)
        layer.refresh_indices()
    assert torch.equal(logits_of(model), before)


def test_snapping_near_ones_leaves_the_others() -> None:
    grid = grids_of(lut_size=4)[NAME]
    before, wanted = grid.weight.clone(), grid.layer.dequantized()
    hits = float(grid.sums(0.2)[1])
    grid.snap(0.2)
    on = grid.weight == wanted
    assert 0 < int(on.sum()) < on.numel() and abs(int(on.sum()) - hits) <= 2
    assert torch.equal(grid.weight[~on], before[~on])
    assert ((before - wanted).abs() <= 0.21 * grid.steps[:, None])[on].all()


@pytest.mark.parametrize("atol", [0.2, math.inf])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_hard_is_restored_bit_for_bit(atol: float, fails: bool) -> None:
    model = quantized(lut_size=4)
    grids = [LayerGrid(layer) for layer in quantized_layers(model).values()]
    before = state_of(model)
    try:
        with hardened(grids, atol):
            assert not same(state_of(model), before)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(state_of(model), before)


def test_a_plain_layer_shares_its_masters() -> None:
    model = quantized("qwen2", ste_fp16=False)
    for layer in quantized_layers(model).values():
        plain = master_linear(layer)
        assert plain.weight is layer.weight and plain.bias is layer.bias
    x = torch.randn(3, layer.in_features)
    assert torch.equal(plain(x), x @ layer.weight.T)  # the last one has no bias


def test_snapped_layers_have_nothing_to_compare() -> None:
    model = quantized()
    snap_model(model, baked=False)
    layer = quantized_layers(model)[NAME]
    with pytest.raises(MismatchError, match="snapped"):
        LayerGrid(layer)
    with pytest.raises(MismatchError, match="snapped"):
        master_linear(layer)
