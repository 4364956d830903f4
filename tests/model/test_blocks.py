"""A decoder in parts: the same numbers as the whole, nothing else in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.model.blocks import (
    BlockLoader,
    block_prefix,
    decoder_blocks,
    master_block,
    part,
    run_part,
)
from lib.model.surgery import quantized_layers
from lib.snap.snap import snap_model
from tests.tiny_models import FAMILIES, quantized, tiny_model

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_one_after_the_other_are_the_model(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        whole = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        hidden = model.get_input_embeddings()(IDS)
        count = len(decoder_blocks(model))
        for number in range(count):
            hidden = run_part(part(model, number, number + 1, norm=number == count - 1), hidden)
        assert torch.equal(hidden, whole)
        tail = run_part(part(model, 1, None, norm=True), model.get_input_embeddings()(IDS))
        assert not torch.equal(tail, whole)


def test_a_part_shares_its_modules_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    view = part(model, 1, 2, norm=False)
    assert decoder_blocks(view)[0] is decoder_blocks(model)[1]
    assert len(decoder_blocks(model)) == 2 and len(decoder_blocks(view)) == 1
    assert model.config.num_hidden_layers == 2
    assert not any(parameter.shape[0] == 97 for parameter in view.parameters())  # embeddings


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no list of decoder blocks"):
        decoder_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_the_loader_reads_one_block_at_a_time(tmp_path: Path, family: str, shard: str) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loader = BlockLoader(tmp_path)
    x = torch.randn(2, 5, model.config.hidden_size)
    with torch.no_grad():
        assert torch.equal(loader.embeddings()(IDS), model.get_input_embeddings()(IDS))
        for number in (1, 0):
            wanted = run_part(part(model, number, number + 1, norm=False), x)
            assert torch.equal(run_part(loader.block(number), x), wanted)
    assert all(parameter.is_meta for parameter in loader.model.parameters())


def test_the_loader_names_what_is_missing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match=r"model\.safetensors is missing"):
        BlockLoader(tmp_path)
    (tmp_path / "elsewhere").rename(file)
    loader = BlockLoader(tmp_path)
    del loader._files["model.layers.1.mlp.up_proj.weight"]
    loader.block(0)
    with pytest.raises(CorruptError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        loader.block(1)


def test_the_master_block_computes_with_masters() -> None:
    teacher, student = tiny_model("qwen2"), quantized("qwen2", ste_fp16=False)
    x = torch.randn(2, 5, teacher.config.hidden_size)
    with torch.no_grad():
        wanted = run_part(part(teacher, 1, 2, norm=False), x)
        assert torch.equal(run_part(master_block(student, 1), x), wanted)
        assert not torch.equal(run_part(part(student, 1, 2, norm=False), x), wanted)
    assert len(quantized_layers(student)) == 14
    snap_model(student, baked=False)
    with pytest.raises(MismatchError, match="snapped"):
        master_block(student, 1)
    assert len(quantized_layers(student)) == 14


def test_prefix() -> None:
    names = [name for name, _ in tiny_model().named_parameters()]
    assert sum(name.startswith(block_prefix(tiny_model(), 1)) for name in names) == 9
