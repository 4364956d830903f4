"""Where the arithmetic runs."""

from __future__ import annotations

import torch

from lib.base.errors import ParamsError


def resolve_device(name: str) -> torch.device:
    """The device that ``run.device`` names; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ParamsError: unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind = name.split(":")[0]
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in available:
        raise ParamsError(f"run.device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps")
    if not available[kind]:
        here = ", ".join(key for key, value in available.items() if value)
        raise ParamsError(f"run.device {name!r} is not on this machine; available: {here}")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ParamsError(
            f"run.device {name!r} is malformed; use auto, cpu, cuda, cuda:N or mps"
        ) from None


def set_threads(threads: int) -> None:
    """Limit torch to ``threads`` CPU threads; 0 leaves its own choice (all cores)."""
    if threads > 0:
        torch.set_num_threads(threads)
