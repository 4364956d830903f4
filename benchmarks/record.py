"""What every benchmark writes: ``benchmarks/results/<name>.json`` with all that explains it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from lib.base.files import write_json

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "accelerate", "numpy", "pyarrow")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def machine() -> dict[str, Any]:
    """Processor, cores and system that the figures come from."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": gpu,
    }


def save(
    name: str,
    *,
    config: dict[str, Any],
    samples: dict[str, Any],
    summary: dict[str, float],
    on: dict[str, Any],
    versions: dict[str, str] | None = None,
) -> Path:
    """Write the result file of benchmark ``name``.

    Args:
        on: :func:`machine`, taken before.
        versions: of packages that only this benchmark uses.
    """
    path = RESULTS / f"{name}.json"
    found = {package: importlib.metadata.version(package) for package in _PACKAGES}
    write_json(
        path,
        {
            "name": name,
            "date": datetime.date.today().isoformat(),
            "config": config,
            "versions": {"python": platform.python_version(), **found, **(versions or {})},
            "machine": on,
            "samples": samples,
            "summary": summary,
        },
    )
    for key, value in summary.items():
        print(f"{key}: {value:.4g}")
    return path
