"""Stage quant from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.base.errors import CorruptError, MismatchError
from lib.model.checkpoint import load_checkpoint
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.model.moments import StoredMoments
from lib.model.surgery import quantize_model, quantized_layers
from lib.params.data import Run
from lib.params.specs import model_spec
from lib.params.training import Quant
from lib.quant.spec import Moments
from lib.start.calibrate import MOMENTS, calibrate_stage
from lib.start.quantize import quant_stage
from lib.text.sequences import TokenSet
from lib.train.run import start_from_checkpoint
from tests.start.place import make_place

RUN = Run(device="cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher``, ``train`` and ``calibrate``, all products of inputs."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder / "root"))
        made = (folder / "teacher", folder / "train", folder / "calibrate")
        calibrate_stage(*made, sequences=8, needed=Moments.PRODUCTS, run=RUN)
    return folder


def stage(place: Path, out: Path, init: Any, moments: str = "calibrate") -> dict[str, Any]:
    spec = model_spec(Quant(init=init, lut_size=4, rank=2, group_size=16))
    moments_file = place / moments / MOMENTS
    return quant_stage(place / "teacher", moments_file, out, spec=spec, run=RUN, declared="d")


@pytest.mark.parametrize("init", ["maxabs", "importance", "gptq", "importance+gptq"])
def test_is_the_quantized_teacher(place: Path, tmp_path: Path, init: Any) -> None:
    metrics = stage(place, tmp_path, init)
    mark = folder_fingerprint(place / "teacher")
    spec = model_spec(Quant(init=init, lut_size=4, rank=2, group_size=16))
    moments = StoredMoments(place / "calibrate" / MOMENTS, teacher=mark, full="gptq" in init)
    wanted = load_causal_lm(place / "teacher")
    quantize_model(wanted, spec, None if init == "maxabs" else moments)
    model, info = load_checkpoint(tmp_path / "model")
    for name, layer in quantized_layers(wanted).items():
        found = quantized_layers(model)[name]
        assert torch.equal(found.dequantized(), layer.dequantized())
        assert found.weight is not None and layer.weight is not None
        assert torch.equal(found.weight, layer.weight)
    assert (info["stage"], info["teacher"], info["parent"]) == ("quant", mark, mark)
    assert info["moments"] == (None if init == "maxabs" else moments.info["fingerprint"])
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"quant": metrics}
    assert metrics["layers"] == len(quantized_layers(model))
    assert metrics["calibration_sequences"] == (0 if init == "maxabs" else 8)
    assert start_from_checkpoint(tmp_path / "model").teacher == mark


def test_starts_differ(place: Path, tmp_path: Path) -> None:
    weights = []
    for init in ("maxabs", "importance", "gptq", "importance+gptq"):
        stage(place, tmp_path / init, init)
        layers = quantized_layers(load_checkpoint(tmp_path / init / "model")[0])
        weights.append(layers["model.layers.1.mlp.up_proj"].dequantized())
    for index, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:index])


def test_max_abs_needs_no_moments_and_the_others_need_the_teachers(
    place: Path, tmp_path: Path
) -> None:
    stage(place, tmp_path / "one", "maxabs", moments="absent")
    other = make_place(tmp_path / "other", seed=1)
    (other / "calibrate").symlink_to(place / "calibrate")
    with pytest.raises(MismatchError, match="made with teacher .* rerun the calibrate stage"):
        stage(other, tmp_path / "two", "importance")
    assert not (tmp_path / "two").exists()


def test_damaged_moments_are_refused(place: Path, tmp_path: Path) -> None:
    whole = (place / "calibrate" / MOMENTS).read_bytes()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / MOMENTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp_path / "teacher").symlink_to(place / "teacher")
    with pytest.raises(CorruptError, match="is damaged; rerun the calibrate stage"):
        stage(tmp_path, tmp_path / "out", "gptq", moments="moved")
    assert not (tmp_path / "out").exists()


def test_importance_refits_bring_the_outputs_nearer(place: Path, tmp_path: Path) -> None:
    rows = TokenSet(place / "train").first(4)
    ids = torch.tensor(rows.input_ids, dtype=torch.int64)
    teacher = load_causal_lm(place / "teacher")(input_ids=ids).logits
    errors = []
    for number, init in enumerate(("maxabs", "importance", "importance")):
        stage(place, tmp_path / str(number), init)
        model, _ = load_checkpoint(tmp_path / str(number) / "model")
        errors.append(float((model(input_ids=ids).logits - teacher).norm() / teacher.norm()))
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] == errors[2]
