"""The moving average, of numbers and of tensors alike."""

from __future__ import annotations

import torch

from lib.quant.average import moved_average


def test_numbers_and_tensors_move_alike() -> None:
    number, tensor = 0.0, torch.zeros(2, dtype=torch.float64)
    for value in (3.0, -1.0, 0.5):
        number = moved_average(number, value, 0.9)
        tensor = moved_average(tensor, torch.full((2,), value, dtype=torch.float64), 0.9)
    assert abs(number - (0.81 * 0.3 - 0.9 * 0.1 + 0.05)) < 1e-15
    assert tensor.tolist() == [number, number]
