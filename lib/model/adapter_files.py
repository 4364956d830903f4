"""The folder of an adapter: what lies in it, and whether it holds one. Needs no torch.

Trained: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, and ``recover.json``,
which says what they belong to. Not trained: ``recover.json`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.base.errors import InputError
from lib.base.files import atomic_folder, read_json, write_json

INFO = "recover.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def write_untrained(folder: Path) -> None:
    """Write the folder of a run that trained no adapter."""
    with atomic_folder(folder) as temporary:
        write_json(temporary / INFO, {"trained": False, "reason": "recover.steps is 0"})


def has_adapter(folder: Path) -> bool:
    """Whether a stage trained an adapter into this folder."""
    return (folder / CONFIG).is_file()


def read_info(folder: Path) -> dict[str, Any]:
    """What ``recover.json`` says; empty for an adapter of another origin.

    Raises:
        InputError: there is no adapter in the folder.
        CorruptError: a file is not JSON.
    """
    info = dict(read_json(folder / INFO)) if (folder / INFO).is_file() else {}
    if not has_adapter(folder):
        why = f" ({info['reason']})" if "reason" in info else ""
        raise InputError(
            f"{folder} holds no adapter{why}; give a folder with {CONFIG}, such as "
            "runs/recover/adapter after a run with recover.steps above 0"
        )
    return info
