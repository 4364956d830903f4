"""Perplexity of a token stream by sliding windows.

Windows of ``window`` tokens begin every ``stride`` tokens; each scores only the tokens that no
earlier window scored, so that a token is scored once, with at least ``window - stride`` tokens of
context after the first window. The stream's first token has no context and is never scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lib.base.errors import InputError
from lib.base.progress import track

TOKENS_PER_BATCH = 2048
ROWS_PER_CHUNK = 256  # logits scored at a time: bounds the [rows, vocabulary] temporaries


@dataclass(frozen=True)
class Window:
    """Tokens ``[start, end)`` of the stream, of which ``[first, end)`` are scored."""

    start: int
    first: int
    end: int


def plan_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows over a stream of ``tokens`` tokens.

    Raises:
        InputError: fewer than two tokens, or a stride outside 1..window.
    """
    if tokens < 2:
        raise InputError(f"perplexity needs a stream of at least 2 tokens; it has {tokens}")
    if not 1 <= stride <= window or window < 2:
        raise InputError(
            f"stride {stride} must lie in 1..window ({window}), and window be 2 or more"
        )
    windows = []
    start, first = 0, 1
    while first < tokens:
        end = min(start + window, tokens)
        windows.append(Window(start=start, first=first, end=end))
        # A window cannot score its own first token, so it begins no later than the last scored one.
        start, first = min(start + stride, end - 1), end
    return windows


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, stream: np.ndarray, window: int, stride: int, label: str = "perplexity"
) -> float:
    """exp of the mean negative log-likelihood of ``stream`` (int ``[N]``), in nats per token.

    Infinite where the mean overflows a float64's exp (a destroyed model), never clamped.

    Raises:
        InputError: see :func:`plan_windows`.
    """
    windows = plan_windows(len(stream), window, stride)
    model.eval()
    ids = torch.from_numpy(np.asarray(stream, dtype=np.int64)).to(model.device)
    total = 0.0
    batches = _batches(windows, max(1, TOKENS_PER_BATCH // window))
    for batch in track(batches, len(batches), label):
        rows = torch.stack([ids[w.start : w.end] for w in batch])
        context = batch[0].first - batch[0].start
        keep = rows.shape[1] - context + 1  # one more: logits at t predict token t + 1
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        total += _nll(logits.flatten(0, 1), rows[:, context:].flatten())
    mean = total / (len(stream) - 1)
    return math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf


def _batches(windows: list[Window], size: int) -> list[list[Window]]:
    """Neighbouring windows of one shape, at most ``size`` together."""
    batches: list[list[Window]] = []
    for window in windows:
        last = batches[-1] if batches else []
        if last and len(last) < size and _shape(last[0]) == _shape(window):
            last.append(window)
        else:
            batches.append([window])
    return batches


def _shape(window: Window) -> tuple[int, int]:
    return window.end - window.start, window.end - window.first


def _nll(logits: Tensor, labels: Tensor) -> float:
    """Summed negative log-likelihood: logits ``[P, V]``, labels ``[P]``."""
    return sum(
        float(F.cross_entropy(rows.float(), wanted, reduction="sum").double())
        for rows, wanted in zip(
            logits.split(ROWS_PER_CHUNK), labels.split(ROWS_PER_CHUNK), strict=True
        )
    )
