"""Core AI packages, executed by Core AI's CPU runtime; skipped where the extra is not installed."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.base.errors import CorruptError, InputError
from lib.export import layers
from lib.export.coreai import half_precision, run_coreai, save_coreai
from lib.export.graph import DeployedDecoder, step_inputs
from lib.export.layers import FactoredConv
from tests.export.models import IDS, SLOTS, TOKENS, decoder, snapped
from tests.tiny_models import tiny_model

needs_coreai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None,
    reason="the optional extra coreai is not installed (requirements-coreai.txt)",
)
SPARE = 2.5
"""Core AI's CPU runtime was seen to lose 0.9 to 1.8 times what torch loses in FP16."""


def inputs(graph: DeployedDecoder, ids: list[int], tokens: int) -> dict[str, Tensor]:
    """A first call, with an empty cache."""
    keys, values = graph.empty_cache()
    return step_inputs(ids, 0, tokens, SLOTS).named() | {"keys": keys, "values": values}


@torch.no_grad()
def computed(graph: DeployedDecoder, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch computes, in the precision of the graph."""
    half = graph.cosines.dtype == torch.float16
    cast = {n: v.half() if half and v.is_floating_point() else v for n, v in given.items()}
    *logits, keys, values = graph(**cast)
    named = {f"logits_{number}": part.float() for number, part in enumerate(logits)}
    return joined(named | {"new_keys": keys.float(), "new_values": values.float()})


def joined(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The slices of the vocabulary as one tensor."""
    slices = [outputs[f"logits_{number}"] for number in range(len(outputs) - 2)]
    cache = {name: outputs[name] for name in ("new_keys", "new_values")}
    return {"logits": torch.cat(slices, 1), **cache}


def _distance(one: Tensor, other: Tensor) -> float:
    """Root of the mean squared difference: steadier than the largest one."""
    return float((one.float() - other).pow(2).mean().sqrt())


def tolerance(graph: DeployedDecoder, given: dict[str, Tensor]) -> dict[str, float]:
    """What torch itself loses in FP16, and a little more, for each output."""
    exact, naive = computed(graph, given), computed(copy.deepcopy(graph).half(), given)
    return {name: SPARE * _distance(naive[name], exact[name]) for name in exact}


def excess(found: dict[str, Tensor], exact: dict[str, Tensor], allowed: dict[str, float]) -> float:
    """The largest distance of a package's output as a multiple of what is allowed."""
    together = joined(found)
    return max(_distance(together[n], exact[n]) / allowed[n] for n in exact)


def saved(graph: DeployedDecoder, folder: Path) -> Path:
    out = folder / "model.aimodel"
    save_coreai(graph, out, tokens=TOKENS)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeployedDecoder, Path]:
    """A graph of 4-bit layers and its package, which no test changes."""
    graph = decoder(lut_size=16)
    return graph, saved(graph, tmp_path_factory.mktemp("coreai"))


@needs_coreai
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"lut_size": 2}), ("qwen2", {"lut_size": 4}), ("qwen3", {"lut_size": 16})],
)
def test_it_computes_what_torch_computes(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    graph = decoder(family, **changes)
    package = saved(graph, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.aimodel"]
    given = inputs(graph, IDS[:TOKENS], TOKENS)
    found = run_coreai(package, given)
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert excess(found, computed(graph, given), tolerance(graph, given)) <= 1
    # the cache that came out goes into decode
    cache = {"keys": found["new_keys"], "values": found["new_values"]}
    step = step_inputs(IDS[TOKENS : TOKENS + 1], TOKENS, 1, SLOTS).named() | cache
    exact_step = {name: value.float() for name, value in cache.items()}
    exact = computed(graph, step | exact_step)
    allowed = tolerance(graph, step | exact_step)
    assert excess(run_coreai(package, step, "decode"), exact, allowed) <= 1


@needs_coreai
def test_slices_come_back_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """13 slices of the head have other values each, whatever order they come in."""
    monkeypatch.setattr(layers, "HEAD_SLICE", 8)
    graph = decoder()
    assert len(graph.head) == 13
    given = inputs(graph, IDS[:5], TOKENS)
    exact = computed(graph, given)
    found = run_coreai(saved(graph, tmp_path), given)
    allowed = tolerance(graph, given)
    assert excess(found, exact, allowed) <= 1
    swapped = {**found, "logits_1": found["logits_2"], "logits_2": found["logits_1"]}
    assert excess(swapped, exact, allowed) > 10


@needs_coreai
def test_one_flipped_index_shows(tmp_path: Path) -> None:
    graph = decoder(lut_size=16)
    given = inputs(graph, IDS[:TOKENS], TOKENS)
    exact, allowed = computed(graph, given), tolerance(graph, given)
    layer: FactoredConv = graph.layers()["model.layers.1.self_attn.v_proj"]
    kept = layer.indices
    layer.indices = kept.clone()
    column = int((layer.a[0, 0, :, 0] @ layer.b[0, :, :, 0].T).abs().argmax())
    layer.indices[0, column] = 0 if kept[0, column] > 7 else 15
    assert int((layer.indices != kept).sum()) == 1
    found = run_coreai(saved(graph, tmp_path), given)
    assert excess(found, exact, allowed) > 5


@needs_coreai
def test_indices_are_packed(made: tuple[DeployedDecoder, Path]) -> None:
    """4 bits each, one LUT per layer, in both functions."""
    graph, package = made
    program = str(importlib.import_module("coreai.authoring").AIModelAsset.load(package).program)
    layers_in_both = 2 * len(graph.layers())
    assert program.count("coreai.lut_to_dense") == layers_in_both
    assert program.count("xui4>, tensor<1x1x1x1x16x1xf16>") == layers_in_both


@needs_coreai
def test_the_functions_share_their_weights(tmp_path: Path) -> None:
    """The file is smaller than two copies of them, or than an embedding stored twice."""
    model = tiny_model("qwen3")
    model.resize_token_embeddings(8000, mean_resizing=False)
    graph = DeployedDecoder(model, SLOTS)
    assert graph.head is graph.embedding.slices
    embedding = 2 * sum(part.numel() for part in graph.head)
    rest = 2 * sum(p.numel() for p in graph.blocks.parameters())
    size = (saved(graph, tmp_path) / "main.mlirb").stat().st_size
    assert embedding + rest < size < 1.5 * embedding


@needs_coreai
def test_the_graph_is_not_changed(made: tuple[DeployedDecoder, Path]) -> None:
    saved_graph, fresh = made[0], decoder(lut_size=16)
    half = half_precision(saved_graph)
    assert half.head is half.embedding.slices  # tied stays tied
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    given = inputs(fresh, IDS[:TOKENS], TOKENS)
    before, after = computed(fresh, given), computed(saved_graph, given)
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_coreai
def test_baked_models_have_no_lut(tmp_path: Path) -> None:
    graph = DeployedDecoder(snapped("llama", baked=True), SLOTS)
    given = inputs(graph, IDS[:TOKENS], TOKENS)
    found = run_coreai(saved(graph, tmp_path), given)
    assert excess(found, computed(graph, given), tolerance(graph, given)) <= 1


@needs_coreai
def test_wrong_names_and_damage_are_told(
    made: tuple[DeployedDecoder, Path], tmp_path: Path
) -> None:
    graph, package = made
    given = inputs(graph, IDS[:TOKENS], TOKENS)
    with pytest.raises(InputError, match=r"functions are \['prefill', 'decode'\], not main"):
        run_coreai(package, given, "main")
    del given["keys"]
    with pytest.raises(InputError, match="inputs are .*'keys'"):
        run_coreai(package, given)
    damaged = tmp_path / "model.aimodel"
    shutil.copytree(package, damaged)
    program = bytearray((damaged / "main.mlirb").read_bytes())
    program[len(program) // 2] ^= 1
    (damaged / "main.mlirb").write_bytes(program)
    with pytest.raises(CorruptError, match="checksum differs"):
        run_coreai(damaged, given)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("model.mlpackage", {}, "must end in .aimodel"),
        ("model.aimodel", {"lut_size": 8}, "LUT of 8; Core AI stores 2, 4, 16, 64, 256 only"),
    ],
)
def test_what_cannot_be_saved(name: str, changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        save_coreai(decoder(**changes), tmp_path / name, tokens=TOKENS)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("coreai_torch", "coreai.authoring"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    graph = decoder()
    with pytest.raises(InputError, match="optional extra 'coreai'"):
        save_coreai(graph, tmp_path / "model.aimodel", tokens=TOKENS)
    assert not list(tmp_path.iterdir())


def test_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.aimodel does not exist"):
        run_coreai(tmp_path / "none.aimodel", {})
    with pytest.raises(CorruptError, match="is no Core AI package"):
        run_coreai(tmp_path, {})
