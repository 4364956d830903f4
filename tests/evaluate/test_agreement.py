"""KL and top-1 agreement against full logits compared position by position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.evaluate.agreement import TeacherTarget, make_batches
from lib.model.tiny import random_teacher

LENGTHS = np.array([20, 7, 1, 13, 20], dtype=np.int32)


def _rows(pad: int = 0) -> np.ndarray:
    ids = np.random.default_rng(1).integers(3, 250, (len(LENGTHS), 20)).astype(np.int32)
    ids[np.arange(20) >= LENGTHS[:, None]] = pad
    return ids


def _student() -> PreTrainedModel:
    model, _ = random_teacher("llama", seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def _slow(teacher: PreTrainedModel, student: PreTrainedModel) -> tuple[float, float, int]:
    """Unpadded rows, float64, one at a time."""
    divergences, same = [], []
    for row, length in zip(_rows(), LENGTHS, strict=True):
        if length < 2:
            continue
        ids = torch.from_numpy(row[:length].astype(np.int64))[None]
        with torch.no_grad():
            p = teacher(ids).logits[0, :-1].double()
            q = student(ids).logits[0, :-1].double()
        kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        divergences += kl.tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return float(np.mean(divergences)), float(np.mean(same)), len(same)


@pytest.mark.parametrize("tokens_per_batch", [20, 45, 512])
def test_equals_the_slow_reference(tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.evaluate.agreement.TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr("lib.distill.compare.ROWS_PER_CHUNK", 11)
    teacher, student = random_teacher("llama", seed=0)[0], _student()
    kl, top1, positions = _slow(teacher, student)
    agreement = TeacherTarget(teacher, _rows(), LENGTHS).compare(student)
    assert agreement.positions == positions == int((LENGTHS - 1).sum())
    assert agreement.kl == pytest.approx(kl, rel=1e-3)
    assert agreement.top1 == top1
    assert 0.01 < kl < 3
    assert top1 < 1


def test_the_direction_is_teacher_to_student() -> None:
    teacher, student = random_teacher("llama", seed=0)[0], _student()
    forward = TeacherTarget(teacher, _rows(), LENGTHS).compare(student).kl
    backward = TeacherTarget(student, _rows(), LENGTHS).compare(teacher).kl
    assert forward != pytest.approx(backward, rel=1e-3)


def test_the_teacher_agrees_with_itself() -> None:
    teacher, _ = random_teacher("qwen3", seed=0)  # tied embeddings
    agreement = TeacherTarget(teacher, _rows(), LENGTHS).compare(teacher)
    assert abs(agreement.kl) < 1e-6
    assert agreement.top1 == 1.0


def test_padding_is_not_scored() -> None:
    teacher, student = random_teacher("llama", seed=0)[0], _student()
    one = TeacherTarget(teacher, _rows(pad=0), LENGTHS).compare(student)
    other = TeacherTarget(teacher, _rows(pad=99), LENGTHS).compare(student)
    assert one.kl == pytest.approx(other.kl, rel=1e-6)
    counted = TeacherTarget(teacher, _rows(), np.full(len(LENGTHS), 20)).compare(student)
    assert counted.positions != one.positions


def test_teacher_logits_are_not_kept() -> None:
    teacher, _ = random_teacher("llama", seed=0)
    target = TeacherTarget(teacher, _rows(), LENGTHS)
    kept = sum(hidden.numel() for hidden in target.hidden)
    assert kept == int((LENGTHS - 1).sum()) * teacher.config.hidden_size


def test_non_finite_logits_show() -> None:
    teacher, student = random_teacher("llama", seed=0)[0], _student()
    with torch.no_grad():
        student.get_output_embeddings().weight[0, 0] = math.nan
    assert math.isnan(TeacherTarget(teacher, _rows(), LENGTHS).compare(student).kl)


def test_another_vocabulary_is_refused() -> None:
    teacher, student = random_teacher("llama", seed=0)[0], _student()
    student.set_output_embeddings(nn.Linear(64, 300, bias=False))
    with pytest.raises(MismatchError, match="300"):
        TeacherTarget(teacher, _rows(), LENGTHS).compare(student)


def test_nothing_to_score() -> None:
    with pytest.raises(InputError, match="at least 2 tokens"):
        make_batches(_rows(), np.ones(len(LENGTHS), dtype=np.int32))
    with pytest.raises(InputError, match="at least 2 tokens"):
        make_batches(np.zeros((0, 20), np.int32), np.zeros(0, np.int32))


def test_logits_changed_after_the_head_are_refused() -> None:
    teacher, _ = random_teacher("llama", seed=0)
    teacher.register_forward_hook(lambda module, inputs, output: _capped(output))
    with pytest.raises(InputError, match="soft-capping"):
        TeacherTarget(teacher, _rows(), LENGTHS)


def _capped(output):  # type: ignore[no-untyped-def]
    output.logits = torch.tanh(output.logits)
    return output
