"""ANEMLL checkpoints: our importer and an independent slow reader find what was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.export.anemll import save_anemll
from lib.model.foreign import import_reference
from lib.model.linear import DirectionalScale, LutLinear
from lib.model.rescale import scale_residual
from lib.model.surgery import quantize_model, quantized_layers
from lib.quant.spec import Codebook, ModelSpec, ScaleForm
from lib.snap.snap import snap_model
from tests.export import anemll_reader as reader
from tests.export.snapped_models import rounding, save_base, snapped
from tests.tiny_models import linear_spec, logits_of, quantized, state_of, tiny_model

LAYER = "model.layers.1.self_attn.k_proj"
V1: dict[str, Any] = {"scale": ScaleForm.LOWRANK, "group_size": 20}  # pads 32 inputs to 40
GROUP: dict[str, Any] = {"scale": ScaleForm.GROUP, "group_size": 20}  # two of them, or four
CHANNEL: dict[str, Any] = {"scale": ScaleForm.CHANNEL}
V2: dict[str, Any] = {"scale": ScaleForm.DIRECTIONAL, "lut_size": 4, "codebook": Codebook.LEARNED}
FORMS = [("v1", V1), ("v1", GROUP), ("v1", CHANNEL), ("v2", V2)]
IDS = ["v1", "v1 group", "v1 channel", "v2"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(folder / name, name) for name in ("llama", "qwen2", "qwen3")}


def exported(model: PreTrainedModel, out: Path, **expected: Any) -> tuple[dict[str, Tensor], Any]:
    """State dict and config of the model's checkpoint."""
    report = save_anemll(model, out, model_id="some/model")
    assert report["layers"] == len(quantized_layers(model))
    assert expected.items() <= report.items()
    return reader.read_folder(out)


def assert_close(found: Tensor, layer: LutLinear) -> None:
    """W_q within a few float32 roundings."""
    assert ((found - layer.dequantized()).abs() <= rounding(layer)).all()


def levelled(model: PreTrainedModel, levels: list[float]) -> PreTrainedModel:
    """The same model with other LUTs (FP16-exact, as if they had been trained)."""
    for layer in quantized_layers(model).values():
        layer.lut.copy_(torch.tensor(levels).half().float())
    return model


def make_model(version: str, family: str, form: dict[str, Any] = V1) -> PreTrainedModel:
    if version == "v1":
        return snapped(family, **form)
    return levelled(snapped(family, **V2), [-1.0, -0.3213, 0.3217, 0.9])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("version", "form"), FORMS, ids=IDS)
def test_import_gives_the_model_back(
    bases: dict[str, Path], tmp_path: Path, version: str, form: dict[str, Any], family: str
) -> None:
    model = make_model(version, family, form)
    before = state_of(model)
    exported(model, tmp_path / "out", version=version)
    again, info = import_reference(tmp_path / "out", bases[family])
    assert info["form"] == version.upper()
    assert info["tensors_from_base"] == 0
    layers = quantized_layers(model)
    for name, layer in quantized_layers(again).items():
        assert torch.equal(layer.indices, layers[name].indices)
        assert torch.equal(layer.lut, layers[name].lut)
        if version == "v1":  # its factors are stored as they are
            assert torch.equal(layer.dequantized(), layers[name].dequantized())
        else:  # directions are normalized again
            assert_close(layer.dequantized(), layers[name])
    plain = again.state_dict()
    inside = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)  # exporting changes nothing
        if name not in inside or name.endswith(".bias"):
            assert torch.equal(plain[name], value)
    expected = logits_of(model)
    largest = float(expected.abs().max())
    assert torch.allclose(logits_of(again), expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", [V1, GROUP, CHANNEL], ids=["lowrank", "group", "channel"])
def test_slow_reader_finds_every_v1_weight(
    tmp_path: Path, family: str, form: dict[str, Any]
) -> None:
    """However the reference's scripts read V1: as baked, or quantizing again."""
    model = make_model("v1", family, form)
    state, config = exported(model, tmp_path / "out", version="v1", not_v1=None)
    assert config["snapped_mode"] == "baked"
    beside = torch.load(tmp_path / "out" / "indices.pt", weights_only=True)
    assert beside.keys() == quantized_layers(model).keys()
    for name, layer in quantized_layers(model).items():
        tensors = reader.layer_of(state, name)
        assert reader.v1_indices(tensors) == layer.indices.tolist()
        assert torch.equal(beside[name], layer.indices)
        assert torch.equal(reader.v1_weight(tensors, "baked").float(), layer.dequantized())
        assert_close(reader.v1_weight(tensors, None), layer)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_slow_reader_finds_every_v2_weight(tmp_path: Path, family: str) -> None:
    """However the reference's scripts read V2: by flag or by magnitudes, by indices or levels."""
    model = make_model("v2", family)
    state, _ = exported(model, tmp_path / "out", version="v2")
    for name, layer in quantized_layers(model).items():
        tensors = reader.layer_of(state, name)
        assert torch.equal(tensors["_indices"], layer.indices)
        for by in ("flag", "ones"):
            for levels in ("_indices", "_Q"):
                assert_close(reader.v2_weight(tensors, by=by, levels=levels), layer)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("version", "spec"), FORMS, ids=IDS)
def test_names_and_shapes_are_the_reference_s(
    tmp_path: Path, version: str, spec: dict[str, Any], family: str
) -> None:
    model = tiny_model(family)
    plain = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state, config = exported(snapped(family, **spec), tmp_path / "out", version=version)
    found = {name: tuple(value.shape) for name, value in state.items()}
    assert found == reader.allocated(config, plain)
    types = {name.rpartition(".")[2]: value.dtype for name, value in state.items()}
    special = {"_indices": torch.int16, "_Q": torch.float16, "_scales_baked_flag": torch.int8}
    assert types == dict.fromkeys(types, torch.float32) | (special if version == "v2" else {})
    assert config["model_id"] == "some/model"
    with pytest.raises(AssertionError):  # without V1's padding, or with another rank
        assert found == reader.allocated(config | {"group_size": 7, "scale_rank": 3}, plain)


def test_low_rank_scales_that_v1_cannot_say_become_v2(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    negative = snapped(**V1)
    quantized_layers(negative)[LAYER].scale.b[:, 3] *= -1  # the clamp would make it 1e-8
    trained = levelled(snapped(scale=ScaleForm.LOWRANK, lut_size=4), [-1, -0.3, 0.3, 0.9])
    full = snapped(scale=ScaleForm.LOWRANK, rank=16)  # as many as k_proj has outputs
    many = snapped(scale=ScaleForm.GROUP, group_size=2)
    for number, (model, reason) in enumerate(
        [
            (negative, f"{LAYER} has a scale of -"),
            (trained, "the LUT of model.layers.0.self_attn.q_proj is not linspace"),
            (full, "k_proj has rank 16"),
            (many, "k_proj has rank 16"),
        ]
    ):
        report = save_anemll(model, tmp_path / str(number), model_id="x")
        assert report["version"] == "v2"
        assert reason in report["not_v1"]
        state, _ = reader.read_folder(tmp_path / str(number))
        again = quantized_layers(import_reference(tmp_path / str(number), bases["llama"])[0])
        for name, layer in quantized_layers(model).items():
            assert not isinstance(layer.scale, DirectionalScale)
            assert_close(reader.v2_weight(reader.layer_of(state, name)), layer)
            assert_close(again[name].dequantized(), layer)
            assert torch.equal(again[name].indices, layer.indices)


def test_v1_would_lose_a_negative_scale(tmp_path: Path) -> None:
    """Why it is refused: the reference's clamp takes these weights away."""
    model = snapped(**V1)
    state, _ = exported(model, tmp_path / "out", version="v1")
    layer = quantized_layers(model)[LAYER]
    layer.scale.b[:, 3] *= -1
    tensors = reader.layer_of(state, LAYER)
    tensors["scale_B"][:, 3] *= -1
    tensors["weight"] = layer.dequantized()
    with pytest.raises(AssertionError):
        assert_close(reader.v1_weight(tensors, None), layer)


def test_forms_may_be_mixed(bases: dict[str, Path], tmp_path: Path) -> None:
    """Any directional layer makes the whole checkpoint V2: the reference knows no mixture."""
    model = snapped(**V1)
    other = quantized_layers(snapped(scale=ScaleForm.DIRECTIONAL))[LAYER]
    model.get_submodule(LAYER.rpartition(".")[0]).k_proj = other
    _, config = exported(model, tmp_path / "out", not_v1=f"{LAYER} has directional scales")
    assert config["version"] == "v2"
    again = quantized_layers(import_reference(tmp_path / "out", bases["llama"])[0])
    for name, layer in quantized_layers(model).items():
        assert_close(again[name].dequantized(), layer)


def test_ranks_are_filled_up_with_zeros(bases: dict[str, Path], tmp_path: Path) -> None:
    """The config has one rank for all MLPs; an imported V1 layer may have some more."""
    model = snapped()
    wide = quantized_layers(snapped(rank=7))
    name = "model.layers.0.mlp.up_proj"
    model.get_submodule("model.layers.0.mlp").up_proj = wide[name]
    state, config = exported(model, tmp_path / "out")
    assert (config["mlp_scale_rank"], config["attn_scale_rank"]) == (7, 4)
    again = quantized_layers(import_reference(tmp_path / "out", bases["llama"])[0])
    for name, layer in quantized_layers(model).items():
        assert_close(reader.v2_weight(reader.layer_of(state, name)), layer)
        assert_close(again[name].dequantized(), layer)


def test_attention_may_be_unquantized(bases: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_model()
    plain = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    quantize_mlps(model)
    state, config = exported(model, tmp_path / "out", layers=6)
    assert config["quantize_attn"] is False
    assert {n: tuple(v.shape) for n, v in state.items()} == reader.allocated(config, plain)
    again, _ = import_reference(tmp_path / "out", bases["llama"])
    assert len(quantized_layers(again)) == 6
    expected = logits_of(model)
    assert torch.allclose(logits_of(again), expected, rtol=0, atol=1e-5 * float(expected.max()))


def quantize_mlps(model: PreTrainedModel) -> None:
    quantize_model(model, ModelSpec(mlp=linear_spec(), attention=None))
    model.requires_grad_(False)
    snap_model(model, baked=False)


def rewrite(folder: Path, change: Any) -> Path:
    """Change the state dict (or, if it takes two, the config) of a written checkpoint."""
    state, config = reader.read_folder(folder)
    change(state, config)
    torch.save(state, folder / "model_state_dict.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def flip_index(state: dict[str, Tensor], config: Any) -> None:
    state[f"{LAYER}._indices"][2, 5] ^= 1


def clear_flag(state: dict[str, Tensor], config: Any) -> None:
    state[f"{LAYER}._scales_baked_flag"].zero_()


def swap_levels(state: dict[str, Tensor], config: Any) -> None:
    state[f"{LAYER}.lut"][[0, 1]] = state[f"{LAYER}.lut"][[1, 0]]


@pytest.mark.parametrize("damage", [flip_index, clear_flag, swap_levels])
def test_damage_is_noticed_by_both_readers(
    bases: dict[str, Path], tmp_path: Path, damage: Any
) -> None:
    model = make_model("v2", "llama")
    exported(model, tmp_path / "out")
    rewrite(tmp_path / "out", damage)
    state, _ = reader.read_folder(tmp_path / "out")
    again = quantized_layers(import_reference(tmp_path / "out", bases["llama"])[0])
    for name, layer in quantized_layers(model).items():
        for found in (reader.v2_weight(reader.layer_of(state, name)), again[name].dequantized()):
            wrong = bool(((found - layer.dequantized()).abs() > rounding(layer)).any())
            assert wrong == (name == LAYER)


def test_a_wrong_snapped_mode_is_noticed(bases: dict[str, Path], tmp_path: Path) -> None:
    model = make_model("v1", "llama")
    exported(model, tmp_path / "out")
    rewrite(tmp_path / "out", lambda state, config: config.update(snapped_mode="lut"))
    with pytest.raises(MismatchError, match="values of its LUT"):
        import_reference(tmp_path / "out", bases["llama"])
    state, config = reader.read_folder(tmp_path / "out")
    layer = quantized_layers(model)[LAYER]
    with pytest.raises(AssertionError):
        assert_close(reader.v1_weight(reader.layer_of(state, LAYER), config["snapped_mode"]), layer)


def mixed_luts() -> PreTrainedModel:
    model = snapped()
    name = "model.layers.0.mlp.up_proj"
    other = quantized_layers(snapped(lut_size=4))[name]
    model.get_submodule("model.layers.0.mlp").up_proj = other
    return model


def half_quantized(part: str) -> PreTrainedModel:
    model = snapped()
    block = model.get_submodule(f"model.layers.1.{part.rpartition('.')[0]}")
    leaf = part.rpartition(".")[2]
    setattr(block, leaf, tiny_model().get_submodule(f"model.layers.1.{part}"))
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (tiny_model, "the model has no quantized layer"),
        (quantized, r"q_proj has a master weight.*not snapped"),
        (mixed_luts, r"MLP projections have LUTs of 4 and 16 entries"),
        (lambda: half_quantized("mlp.up_proj"), r"1\.mlp\.up_proj is not quantized; .*all MLP"),
        (lambda: half_quantized("self_attn.o_proj"), r"o_proj is not quantized; .*or none"),
    ],
)
def test_what_it_cannot_hold_is_refused(tmp_path: Path, make: Any, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(InputError, match=text) as caught:
        save_anemll(make(), tmp_path / "out", model_id="x")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_a_rescaled_model_is_refused(tmp_path: Path) -> None:
    """The reference builds its norms from the model's own config, with another eps."""
    model = snapped()
    scale_residual(model, 0.5)
    with pytest.raises(MismatchError, match="has eps .*rescaled"):
        save_anemll(model, tmp_path / "out")


def test_model_id_may_be_left_to_the_command_line(tmp_path: Path) -> None:
    save_anemll(snapped(), tmp_path / "out")
    _, config = reader.read_folder(tmp_path / "out")
    assert "model_id" not in config


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    save_anemll(make_model("v1", "llama"), tmp_path / "out", model_id="x")
    save_anemll(make_model("v2", "llama"), tmp_path / "out", model_id="x")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model_state_dict.pt"]  # V1's indices.pt is gone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
