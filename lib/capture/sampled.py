"""What is kept of the teacher's logits as sampled targets."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.cache.spec import CacheSpec
from lib.distill.sampling import draw

_HALF_MIN = torch.finfo(torch.float16).min


def read_sampled(logits: Tensor, shifts: Tensor, spec: CacheSpec) -> dict[str, Tensor]:
    """What is kept of a chunk: ``logits [C, V]`` float32, ``shifts [C]`` of its positions."""
    logprobs = (logits / spec.sample_temperature).log_softmax(dim=1)
    drawn = draw(logprobs, shifts, spec.samples, spec.sample_power)
    ids = drawn.ids.to(logits.device)
    return {
        "sample_ids": ids.int(),
        "sample_logprobs": logprobs.gather(1, ids).clamp(min=_HALF_MIN).half(),
        "threshold": drawn.threshold.float(),
        "top1_ids": logits.argmax(dim=1).int(),
        # the smallest catches NaN and -inf, the largest +inf
        "finite": logits.amin(dim=1).isfinite() & logits.amax(dim=1).isfinite(),
    }
