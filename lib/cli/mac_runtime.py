"""The calls into Core ML's runtime that `lutqat mac-check` makes. They work on macOS only."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.base.errors import InputError
from lib.export.names import FUNCTIONS

if TYPE_CHECKING:
    import numpy as np

OLDEST_MACOS = 15  # the first with state and several functions in a package
_CONSTANTS = "const"  # const, constexpr_lut_to_dense, ...: computed before any prediction


class Units(StrEnum):
    """What Core ML may use."""

    ALL = "all"
    CPU_AND_NE = "cpu_and_ne"
    CPU_AND_GPU = "cpu_and_gpu"
    CPU_ONLY = "cpu_only"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where Core ML prefers to run an operation.

    Attributes:
        function: of the package.
        kind, name: of the operation; its first output is its name.
        device: ``ANE``, ``GPU``, ``CPU``, or None where the plan says nothing.
        supported: all devices that could run it.
    """

    function: str
    kind: str
    name: str
    device: str | None
    supported: tuple[str, ...]


def require_macos() -> None:
    """Refuse to go on where there is no Core ML runtime with state.

    Raises:
        InputError: another system, or an older macOS.
    """
    system, release = platform.system(), platform.mac_ver()[0]
    if system != "Darwin":
        raise InputError(
            f"mac-check runs a package in Core ML and needs macOS {OLDEST_MACOS} or newer; this is "
            f"{system}. Copy the export folder to a Mac and run it there"
        )
    if int(release.split(".")[0]) < OLDEST_MACOS:
        raise InputError(f"mac-check needs macOS {OLDEST_MACOS} or newer; this is macOS {release}")


class CoreMLRuntime:
    """A package, loaded and compiled by Core ML.

    Args:
        package: an ``.mlpackage`` with the functions ``prefill`` and ``decode``.
        units: what Core ML may use.

    Raises:
        InputError: coremltools is missing, or Core ML does not load the package.
    """

    def __init__(self, package: Path, units: Units) -> None:
        from lib.base.progress import track
        from lib.export.coreml import import_coremltools

        ct = import_coremltools()
        self._units = ct.ComputeUnit[units.name]
        self._models: dict[str, Any] = {}
        for function in track(FUNCTIONS, len(FUNCTIONS), "functions loaded and compiled"):
            with warnings.catch_warnings():
                # a model that Core ML refuses is announced by a warning, and useless
                warnings.simplefilter("error", RuntimeWarning)
                try:
                    self._models[function] = ct.models.MLModel(
                        str(package), function_name=function, compute_units=self._units
                    )
                except (RuntimeWarning, ValueError) as error:
                    raise InputError(
                        f"Core ML does not load function {function} of {package}: {error} (only "
                        "packages with export.target iOS18 have the functions prefill and decode)"
                    ) from None

    def make_state(self) -> Any:
        """An empty cache. Both functions take it: their states have the same names and shapes."""
        return self._models[FUNCTIONS[0]].make_state()

    def predict(
        self, function: str, inputs: dict[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """One call: outputs by name; the state is changed."""
        outputs: dict[str, np.ndarray] = self._models[function].predict(inputs, state=state)
        return outputs

    def placements(self) -> list[Placement]:
        """What MLComputePlan reports for every operation that is no constant."""
        from coremltools.models import compute_device
        from coremltools.models.compute_plan import MLComputePlan

        names = {
            compute_device.MLNeuralEngineComputeDevice: "ANE",
            compute_device.MLGPUComputeDevice: "GPU",
            compute_device.MLCPUComputeDevice: "CPU",
        }
        compiled = self._models[FUNCTIONS[0]].get_compiled_model_path()
        plan = MLComputePlan.load_from_path(compiled, compute_units=self._units)
        functions = plan.model_structure.program.functions
        found = []
        for function in FUNCTIONS:
            for operation in functions[function].block.operations:
                kind = operation.operator_name.rpartition(".")[2]  # "ios18.conv" -> "conv"
                if kind.startswith(_CONSTANTS):
                    continue
                usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
                supported = usage.supported_compute_devices if usage else ()
                found.append(
                    Placement(
                        function=function,
                        kind=kind,
                        name=operation.outputs[0].name if operation.outputs else "",
                        device=names.get(type(usage.preferred_compute_device)) if usage else None,
                        supported=tuple(sorted(names[type(d)] for d in supported)),
                    )
                )
        return found
