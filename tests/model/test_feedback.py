"""Error feedback for the layers of a model: what it needs, what it leaves, who is done together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.base.errors import MismatchError
from lib.model import feedback
from lib.model.feedback import feed_back
from lib.model.linear import LutLinear
from lib.quant.gptq import output_error
from lib.quant.spec import LinearSpec, ScaleForm
from tests.tiny_models import linear_spec

OUT, IN = 24, 48
KINDS: list[dict[str, Any]] = [
    *({"scale": form} for form in ScaleForm),
    *({"scale": ScaleForm.GROUP, "group_size": size} for size in (20, 100)),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products(columns: int = IN, seed: int = 3) -> Tensor:
    """H of correlated inputs."""
    mix = randn(columns, columns, seed=seed + 1) * 0.3 + torch.eye(columns)
    x = randn(200, columns, seed=seed) @ mix
    return x.T @ x / len(x)


def fed(spec: LinearSpec, weight: Tensor, moments: Tensor) -> LutLinear:
    layer = LutLinear.from_weight(weight, None, spec, "up_proj", moments)
    feed_back({"up_proj": layer}, {"up_proj": moments})
    return layer


@pytest.mark.parametrize("refits", [0, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_less_output_is_lost_and_training_can_start(kind: dict[str, Any], refits: int) -> None:
    spec: LinearSpec = linear_spec(lut_size=4, refit_steps=refits, **kind)
    weight, moments = randn(OUT, IN), products()
    with_feedback = dataclasses.replace(spec, feedback=True)
    layer = fed(with_feedback, weight, moments)
    plain = fed(spec, weight, moments)
    assert all(torch.equal(a, b) for a, b in zip(layer.factors(), plain.factors(), strict=True))
    better = dataclasses.replace(with_feedback, descent_steps=3)
    descended = fed(better, weight, moments)
    models = (descended, layer, plain)
    lost = [output_error(weight - one.dequantized(), moments) for one in models]
    assert lost[0] < lost[1] < 0.9 * lost[2]
    assert torch.equal(descended.nearest_indices(), descended.indices)
    # training starts from these indices: the masters have them nearest, and not by a hair
    assert torch.equal(layer.nearest_indices(), layer.indices)
    same = layer.indices == plain.indices
    assert same.any() and not same.all()
    distance = (
        layer.master() / torch.matmul(*layer.factors()) - layer.levels()[layer.indices.long()]
    )
    assert float(distance[~same].abs().median()) < 0.8 * float(layer.levels().diff().max()) / 2


def test_all_moments_are_needed() -> None:
    spec = linear_spec(lut_size=4, feedback=True)
    layer, moments = LutLinear.from_weight(randn(OUT, IN), None, spec, "up_proj"), products()
    for too_little in (None, {"up_proj": moments.diagonal()}):
        with pytest.raises(ValueError, match="up_proj: .*second moments"):
            feed_back({"up_proj": layer}, too_little)
    layer.weight = None
    with pytest.raises(MismatchError, match="no master weight"):
        feed_back({"up_proj": layer}, {"up_proj": moments})


@pytest.mark.parametrize("at_once", [1, 2 * (OUT + IN) * IN, 2**24])
def test_every_layer_is_as_if_alone(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (OUT, IN), "b": (OUT, IN), "c": (IN, OUT), "d": (OUT, IN), "e": (OUT, IN)}
    specs = dict.fromkeys(shapes, linear_spec(lut_size=4, feedback=True, descent_steps=1))
    specs["d"] = dataclasses.replace(specs["d"], lut_size=16)
    specs["e"] = dataclasses.replace(specs["e"], feedback=False)
    moments = {n: products(s[1], seed=10 * i) for i, (n, s) in enumerate(shapes.items())}
    made = {
        n: LutLinear.from_weight(randn(*s, seed=i), None, specs[n], n)
        for i, (n, s) in enumerate(shapes.items())
    }
    before = made["e"].indices.clone()
    monkeypatch.setattr(feedback, "AT_ONCE", at_once)
    feed_back(made, moments)
    assert torch.equal(made["e"].indices, before)
    for i, (name, shape) in enumerate(shapes.items()):
        alone = fed(specs[name], randn(*shape, seed=i), moments[name])
        assert torch.equal(made[name].indices, alone.indices), name
        torch.testing.assert_close(made[name].master(), alone.master(), rtol=1e-4, atol=1e-4)
