"""The static graph computes what the model computes, with any split into calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib.base.errors import InputError
from lib.export.gate import model_logits
from lib.export.graph import DeployedDecoder, check_family, step_inputs
from lib.model.surgery import quantized_layers
from lib.quant.fp16 import MASK_VALUE, is_fp16_exact
from lib.quant.spec import ScaleForm
from tests.export.models import IDS, SLOTS, TOKENS, decoder, graph_logits, snapped
from tests.tiny_models import tiny_model


def _close(one: torch.Tensor, other: torch.Tensor, share: float) -> bool:
    return float((one - other).abs().max()) <= share * float(other.abs().max())


@pytest.mark.parametrize("form", list(ScaleForm))
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_gives_the_models_logits(family: str, form: ScaleForm) -> None:
    model = snapped(family, scale=form)
    graph = graph_logits(DeployedDecoder(model, SLOTS), IDS, TOKENS)
    # rotary tables, and magnitudes times directions, are FP16 constants here
    assert _close(graph, model_logits(model, IDS), 2e-3)


def test_a_baked_model_has_dense_convolutions() -> None:
    model = snapped("llama", baked=True)
    graph = DeployedDecoder(model, SLOTS)
    assert not graph.layers()
    assert _close(graph_logits(graph, IDS, TOKENS), model_logits(model, IDS), 2e-3)


@pytest.mark.parametrize("tokens", [1, 2, 5, 11])
def test_every_split_into_calls_gives_the_same(tokens: int) -> None:
    graph = decoder()
    assert _close(graph_logits(graph, IDS, tokens), graph_logits(graph, IDS, TOKENS), 1e-5)


def test_padding_changes_neither_logits_nor_cache() -> None:
    graph = decoder()
    cache = graph.empty_cache()
    short = step_inputs(IDS[:5], 0, 5, SLOTS)
    padded = step_inputs(IDS[:5], 0, TOKENS, SLOTS)
    with torch.no_grad():
        *logits, keys, values = graph(**short.named(), keys=cache[0], values=cache[1])
        *more, wide_keys, wide_values = graph(**padded.named(), keys=cache[0], values=cache[1])
    assert torch.allclose(more[0][..., :5], logits[0], atol=1e-5)
    assert torch.allclose(wide_keys, keys, atol=1e-6)
    assert torch.allclose(wide_values, values, atol=1e-6)
    assert keys[..., 5:].abs().max() == 0


def test_its_inputs() -> None:
    inputs = step_inputs([7, 8], 3, 4, 6)
    assert inputs.ids.tolist() == [7, 8, 0, 0]
    assert inputs.positions.tolist() == [3, 4, 4, 4]
    assert inputs.write[0, 0].tolist() == [
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert inputs.mask[0, 0, 0].tolist() == [0, 0, 0, 0, MASK_VALUE, MASK_VALUE]


@pytest.mark.parametrize(
    ("ids", "start", "message"),
    [([], 0, "0 tokens"), ([1, 2, 3], 0, "3 tokens do not fit"), ([1, 2], 5, "position 6")],
)
def test_calls_that_do_not_fit_are_refused(ids: list[int], start: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        step_inputs(ids, start, 2, 6)


def test_its_constants_are_fp16_exact() -> None:
    graph = decoder()
    assert all(is_fp16_exact(p) for p in graph.parameters())
    assert is_fp16_exact(graph.cosines) and is_fp16_exact(graph.sines)


def test_tied_embeddings_are_one_constant() -> None:
    tied = decoder("qwen3")
    assert tied.head[0] is tied.embedding.slices[0]
    untied = decoder("llama")
    assert untied.head[0] is not untied.embedding.slices[0]


def test_layers_have_the_models_names() -> None:
    model = snapped("qwen3")
    layers = DeployedDecoder(model, SLOTS).layers()
    assert list(layers) == list(quantized_layers(model))
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layers[name].indices, layer.indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "cannot be exported as a package"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"max_position_embeddings": 8}, "export.context 16 is beyond the model's 8"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic rotary"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope rotary"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    model = tiny_model("qwen3")
    settings = SimpleNamespace(**{**model.config.to_dict(), **change})
    with pytest.raises(InputError, match=message):
        check_family(SimpleNamespace(config=settings), SLOTS)  # type: ignore[arg-type]
