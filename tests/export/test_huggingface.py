"""The dense folder: plain Transformers, in a process without this project, computes the same."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import GateError, InputError, MismatchError
from lib.export.huggingface import save_huggingface
from lib.model.load import load_tokenizer
from lib.model.rescale import scale_residual
from lib.model.size import model_size
from lib.model.surgery import bake, quantized_layers
from lib.quant.spec import Codebook, ScaleForm
from lib.snap.snap import snap_model
from tests.export.snapped_models import save_base, snapped
from tests.tiny_models import logits_of, quantized, state_of

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22]])
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"scale": ScaleForm.LOWRANK},
    "qwen2": {"scale": ScaleForm.DIRECTIONAL, "codebook": Codebook.LEARNED},  # biases
    "qwen3": {"scale": ScaleForm.DIRECTIONAL, "lut_size": 4},  # tied embeddings
}

# What a user without this project runs. `lib` cannot be imported, even where it is installed.
PLAIN = """
import json, sys
from pathlib import Path
sys.modules["lib"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    results = {}
    for name, options in (("float32", {"dtype": torch.float32}), ("float16", {})):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **options
        )
        assert str(model.dtype) == f"torch.{name}", model.dtype
        assert not any(info.values()), info
        results[name] = model(input_ids=torch.tensor(IDS)).logits.detach()
    results["max_new_tokens"] = torch.tensor(model.generation_config.max_new_tokens)
    results["text"] = torch.tensor(AutoTokenizer.from_pretrained(folder)("plain text").input_ids)
    torch.save(results, Path(folder).with_suffix(".pt"))
""".replace("IDS", str(IDS.tolist()))


def baked_half(model: PreTrainedModel) -> PreTrainedModel:
    """The snapped model with its dequantized weights rounded to FP16, held in float32."""
    model = copy.deepcopy(model)
    bake(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per family: its base, its dense folder, and what the plain process found in it."""
    folder = tmp_path_factory.mktemp("dense")
    for family, spec in FAMILIES.items():
        base = save_base(folder / f"base-{family}", family)
        config = {"max_new_tokens": 7, "do_sample": False}
        (base / "generation_config.json").write_text(json.dumps(config))
        save_huggingface(snapped(family, **spec), base, folder / family)
    script = folder / "plain.py"
    script.write_text(PLAIN)
    subprocess.run(
        [sys.executable, "-I", script, *(folder / family for family in FAMILIES)],
        cwd=folder,
        check=True,
        timeout=300,
    )
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_the_fp16_rounding_of_the_weights(folder: Path, family: str) -> None:
    model = snapped(family, **FAMILIES[family])
    tensors = load_file(folder / family / "model.safetensors")
    expected = baked_half(model).state_dict()
    if family == "qwen3":
        del expected["lm_head.weight"]  # tied
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert value.dtype == torch.float16
        assert torch.equal(value.float(), expected[name])
    for name, layer in quantized_layers(model).items():
        error = (tensors[f"{name}.weight"].float() - layer.dequantized()).abs()
        assert (error <= 2**-11 * layer.dequantized().abs() + 2**-25).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_computes_the_same(folder: Path, family: str) -> None:
    """Bit for bit what the baked model gives in the same arithmetic; the LUT model's up to FP16."""
    model = snapped(family, **FAMILIES[family])
    found: dict[str, Tensor] = torch.load(folder / f"{family}.pt", weights_only=True)
    baked = baked_half(model)
    with torch.no_grad():
        exact = baked(input_ids=IDS).logits
        with_lut = model(input_ids=IDS).logits
        for parameter in baked.parameters():  # not .half(), which would round buffers too
            parameter.data = parameter.data.half()
        half = baked(input_ids=IDS).logits
    assert torch.equal(found["float32"], exact)
    assert torch.equal(found["float16"], half)
    lost = float((half.float() - exact).abs().max())  # to FP16 arithmetic
    rounded = float((with_lut - exact).abs().max())  # to the rounding of the weights alone
    assert 0 < rounded <= 2 * lost


@pytest.mark.parametrize("family", FAMILIES)
def test_config_tokenizer_and_generation_are_those_of_the_base(folder: Path, family: str) -> None:
    config = json.loads((folder / family / "config.json").read_text())
    base = json.loads((folder / f"base-{family}" / "config.json").read_text())
    assert config == base | {"dtype": "float16"}
    found = torch.load(folder / f"{family}.pt", weights_only=True)
    tokenizer = load_tokenizer(folder / f"base-{family}")
    assert found["text"].tolist() == tokenizer("plain text")["input_ids"]
    assert int(found["max_new_tokens"]) == 7
    assert {path.name for path in (folder / family).iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_another_weight_would_be_noticed(folder: Path) -> None:
    """The comparison of logits is no formality."""
    model = baked_half(snapped("llama", **FAMILIES["llama"]))
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    weight[3, 4] = -weight[3, 4]
    found = torch.load(folder / "llama.pt", weights_only=True)["float32"]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, found)


def test_card_says_what_it_is(folder: Path) -> None:
    card = (folder / "qwen3" / "README.md").read_text()
    size = model_size(snapped("qwen3", **FAMILIES["qwen3"]))
    assert "# Qwen3ForCausalLM, dense FP16 form" in card
    assert f"16 bits per weight and {2 * size.weights / 1e6:.1f} MB" in card
    assert f"takes {size.bits_per_weight:.2f} bits per weight" in card
    assert f"({size.bits_per_layer_weight:.2f} in the quantized" in card
    assert f"and {size.megabytes:.1f} MB:" in card
    assert "- 14 layers with a 4-entry LUT (2 bits) and directional scales of rank 4\n" in card


def test_a_baked_model_gives_the_same_folder(folder: Path, tmp_path: Path) -> None:
    model = snapped("qwen2", **FAMILIES["qwen2"])
    snap_model(model, baked=True)
    save_huggingface(model, folder / "base-qwen2", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (folder / "qwen2").iterdir()}
    different = [
        name
        for name in sorted(names)
        if (tmp_path / "out" / name).read_bytes() != (folder / "qwen2" / name).read_bytes()
    ]
    assert different == ["README.md"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made from baked weights" in card and "takes " not in card.split("made from")[0]


def test_the_model_is_left_alone(folder: Path, tmp_path: Path) -> None:
    model = snapped()
    before, logits, config = state_of(model), logits_of(model), model.config.to_dict()
    save_huggingface(model, folder / "base-llama", tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits_of(model), logits)
    assert model.config.to_dict() == config


def too_large() -> PreTrainedModel:
    model = snapped()
    quantized_layers(model)["model.layers.0.mlp.up_proj"].scale.g[0] = 65504.0
    quantized_layers(model)["model.layers.0.mlp.up_proj"].scale.b[0] = 60000.0
    return model


@pytest.mark.parametrize(
    ("form", "words"),
    [(ScaleForm.GROUP, "one scale per 20 inputs"), (ScaleForm.CHANNEL, "one scale per output")],
)
def test_the_card_tells_of_scales_without_ranks(
    tmp_path: Path, form: ScaleForm, words: str
) -> None:
    model = snapped(scale=form, lut_size=4, group_size=20)
    save_huggingface(model, save_base(tmp_path / "base"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- 14 layers with a 4-entry LUT (2 bits) and {words}\n" in card


def rescaled() -> PreTrainedModel:
    model = snapped()
    scale_residual(model, 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "base", "error", "text"),
    [
        (rescaled, "base-llama", MismatchError, "input_layernorm has eps .*rescaled"),
        (quantized, "base-llama", InputError, "q_proj has a master weight"),
        (snapped, "nowhere", InputError, "nowhere holds no tokenizer.json"),
        (too_large, "base-llama", GateError, r"0\.mlp\.up_proj\.weight holds .*65504"),
    ],
)
def test_refusals_leave_what_was_there(
    folder: Path, tmp_path: Path, make: Any, base: str, error: type[Exception], text: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(error, match=text) as caught:
        save_huggingface(make(), folder / base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
