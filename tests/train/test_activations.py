"""Hidden states on disk: the model's own, whatever a killed run left."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.base.errors import InputError
from lib.model.blocks import part
from lib.train.activations import Chain
from tests.tiny_models import CPU, tiny_model

IDS = torch.arange(20 * 6).view(20, 6) % 97


def chain(folder: Path, log: list[int] | None = None) -> Chain:
    model = tiny_model()

    def block(number: int) -> torch.nn.Module:
        if log is not None:
            log.append(number)
        return part(model, number, number + 1, norm=False)

    return Chain(folder, IDS, 32, model.get_input_embeddings(), block, CPU)


@torch.no_grad()
def expected(block: int) -> np.ndarray:
    model = tiny_model()
    hidden = model.get_input_embeddings()(IDS)
    if block:
        hidden = part(model, 0, block, norm=False)(inputs_embeds=hidden).last_hidden_state
    return hidden.numpy()


@pytest.mark.parametrize("block", [0, 1, 2])
def test_states_are_the_models(tmp_path: Path, block: int) -> None:
    assert np.allclose(chain(tmp_path).before(block), expected(block), atol=1e-6)


def test_each_block_runs_once_and_old_files_go(tmp_path: Path) -> None:
    log: list[int] = []
    states = chain(tmp_path, log)
    for block in (0, 1, 1, 2):
        states.before(block)
        assert [file.name for file in tmp_path.iterdir()] == [f"before-{block:03d}.npy"]
    assert log == [0, 1]


def test_a_new_process_goes_on_with_what_is_there(tmp_path: Path) -> None:
    wanted = np.array(chain(tmp_path).before(1))
    log: list[int] = []
    (tmp_path / ".tmp-before-002.npy").write_bytes(b"half a file")
    assert np.array_equal(chain(tmp_path, log).before(1), wanted) and log == []
    chain(tmp_path, log).before(2)
    assert log == [1]


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 4 * 20 * 6 * 32 - 1)
    )
    with pytest.raises(InputError, match="hidden states of 20 sequences take"):
        chain(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 4 * 20 * 6 * 32))
    chain(tmp_path)
