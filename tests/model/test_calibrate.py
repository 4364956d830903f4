"""E[x^2] against activations collected by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.base.errors import NonFiniteError
from lib.model import calibrate
from lib.model.calibrate import input_importance
from lib.model.surgery import projections
from tests.tiny_models import quantized, random_rows, tiny_model

ROWS = random_rows(11, "train", 3)
IDS, LENGTHS = torch.from_numpy(ROWS.input_ids).long(), torch.from_numpy(ROWS.lengths)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_mean_square_over_real_tokens(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BATCH", batch)
    model = tiny_model()
    found = input_importance(model, IDS, LENGTHS)
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
    one, two = (input_importance(tiny_model(), ids, LENGTHS) for ids in (IDS, other))
    assert not torch.equal(IDS, other)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_quantized_models_too_and_no_hook_is_left() -> None:
    model = quantized()
    importance = input_importance(model, IDS, LENGTHS)
    assert all((value > 0).any() and value.isfinite().all() for value in importance.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_whose_input_is_not_finite_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        input_importance(model, IDS, LENGTHS)
    assert not any(module._forward_pre_hooks for module in model.modules())
