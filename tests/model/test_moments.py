"""Moments of inputs on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.model.moments import StoredMoments, write_moments

NAMES = ("q_proj", "k_proj", "down_proj")


def products() -> dict[str, Tensor]:
    """Of three layers, two of which have the same inputs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=generator), torch.randn(9, 6, generator=generator)
    shared = x.T @ x
    return {"q_proj": shared, "k_proj": shared, "down_proj": y.T @ y}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_moments(tmp_path / "m.safetensors", products(), {"teacher": "t", "sequences": 5})
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("full", [False, True])
def test_products_are_read_whole_or_as_squares(file: Path, full: bool) -> None:
    kept, wanted = StoredMoments(file, teacher="t", full=full), products()
    assert tuple(kept) == tuple(sorted(NAMES)) and len(kept) == 3
    for name, value in wanted.items():
        assert torch.equal(kept[name], value if full else value.diagonal())
    assert kept.info["sequences"] == 5
    with pytest.raises(KeyError):
        kept["up_proj"]


def test_shared_inputs_are_stored_once(file: Path) -> None:
    size = file.stat().st_size
    apart = {name: value.clone() for name, value in products().items()}
    write_moments(file, apart, {"teacher": "t"})
    assert file.stat().st_size > size + 4 * 4 * 4


def test_squares_do_not_pass_for_products(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    write_moments(file, {"q_proj": torch.rand(4)}, {"teacher": "t"})
    assert StoredMoments(file, teacher="t", full=False)["q_proj"].shape == (4,)
    with pytest.raises(MismatchError, match="no products of inputs, only squares; rerun the cali"):
        StoredMoments(file, teacher="t", full=True)["q_proj"]


def test_another_model_is_refused(file: Path) -> None:
    with pytest.raises(MismatchError, match="made with teacher t, but u is in use here; rerun"):
        StoredMoments(file, teacher="u", full=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the calibrate stage"):
        StoredMoments(tmp_path / "absent", teacher="t", full=True)


def test_every_flipped_byte_is_found(file: Path) -> None:
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises((CorruptError, MismatchError)) as found:
            dict(StoredMoments(file, teacher="t", full=True))
        assert str(file) in str(found.value), position


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_short_file_is_found(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CorruptError, match="is damaged or not a file of moments; rerun"):
        StoredMoments(file, teacher="t", full=True)
