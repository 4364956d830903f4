"""Where the arithmetic runs."""

from __future__ import annotations

import torch

from lib.base.errors import ParamsError

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # others are not known to be faster


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


def product_type(name: str, device: torch.device) -> torch.dtype:
    """What matrix products of training are computed in: ``fp32``, ``bf16``, ``fp16``, or ``auto``:
    bf16 where the device has instructions for it, as a CPU without them is slower than in fp32."""
    if name == "auto":
        name = "bf16" if _multiplies_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(key) for key in _BF16_INSTRUCTIONS)


def set_threads(threads: int) -> None:
    """Limit torch to ``threads`` CPU threads; 0 leaves its own choice (all cores)."""
    if threads > 0:
        torch.set_num_threads(threads)
