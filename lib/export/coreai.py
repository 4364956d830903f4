"""Core AI packages (``.aimodel``) from the static graph, and running them on the CPU.

Core AI has a CPU runtime for Linux too, so a package is not only written but executed here. The
graph is that of :mod:`lib.export.graph` in FP16; the weight of a quantized layer is the operation
``lut_to_dense(indices, lut)``, which the package keeps as packed indices and LUT. The cache goes in
and comes out as tensors.

The packages of the extra ``coreai`` are loaded when needed: they are no part of the pipeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.base.errors import CorruptError, InputError
from lib.base.files import sha256_file
from lib.export.graph import DeployedDecoder, step_inputs
from lib.export.layers import FactoredConv
from lib.export.names import FUNCTIONS

SUFFIX = ".aimodel"
LUT_SIZES = (2, 4, 16, 64, 256)
"""Levels whose indices Core AI packs."""


class LutConv(nn.Module):
    """A :class:`FactoredConv` in FP16 whose weight is looked up in the graph itself.

    The converter finds indices and LUT by the names of these buffers.
    """

    def __init__(self, layer: FactoredConv) -> None:
        super().__init__()
        self.register_buffer("indices", layer.indices[:, :, None, None].contiguous())
        self.register_buffer("lut", layer.lut.half().reshape(1, 1, 1, 1, -1, 1))
        self.register_buffer("a", layer.a.half())
        self.register_buffer("b", layer.b.half())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.half())

    indices: Tensor
    lut: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, 1, S) -> (1, O, 1, S)."""
        weight = torch.ops.coreai.lut_to_dense(self.indices, self.lut, 0)
        y = (F.conv2d(x * self.b, weight) * self.a).sum(2, keepdim=True)
        return y if self.bias is None else y + self.bias


def half_precision(decoder: DeployedDecoder) -> DeployedDecoder:
    """The graph in FP16, its quantized layers as :class:`LutConv`; the given one is not changed.

    Constants are FP16-exact already: nothing is rounded.
    """
    # A deep copy takes what it finds here instead of copying: tied tensors stay tied, and no
    # second float32 model is made.
    instead: dict[int, Any] = {
        id(m): LutConv(m) for m in decoder.modules() if isinstance(m, FactoredConv)
    }
    instead |= {id(p): nn.Parameter(p.half(), False) for p in decoder.parameters()}
    instead |= {id(b): b.half() for b in decoder.buffers()}
    return copy.deepcopy(decoder, instead)


def save_coreai(decoder: DeployedDecoder, out: Path, *, tokens: int) -> None:
    """Write an ``.aimodel`` with the functions ``prefill`` (``tokens`` at a time) and ``decode``.

    Both share one copy of the weights. Inputs are those of :mod:`lib.export.graph`, floating-point
    ones in FP16; outputs are ``logits_0``, ``logits_1``, ... and ``new_keys``, ``new_values``.

    Raises:
        InputError: the extra is not installed, ``out`` has another suffix, or a LUT has a size that
            Core AI does not store.
    """
    if out.suffix != SUFFIX:
        raise InputError(f"{out} must end in {SUFFIX}: Core AI takes no other name")
    for name, layer in decoder.layers().items():
        if len(layer.lut) not in LUT_SIZES:
            sizes = ", ".join(map(str, LUT_SIZES))
            raise InputError(f"{name} has a LUT of {len(layer.lut)}; Core AI stores {sizes} only")
    coreai_torch = _load("coreai_torch")
    _load("coreai_torch._compression.custom_layers")  # defines lut_to_dense
    module = half_precision(decoder)
    outputs = [f"logits_{number}" for number in range(len(decoder.head))]
    converter = coreai_torch.TorchConverter()
    with _quiet(), tempfile.TemporaryDirectory(dir=out.parent) as folder:
        for function, count in zip(FUNCTIONS, (tokens, 1), strict=True):
            example = step_inputs([0] * count, 0, count, decoder.slots).named()
            example["keys"], example["values"] = decoder.empty_cache()
            example = {name: _as_stored(value) for name, value in example.items()}
            program = torch.export.export(module, tuple(example.values()))
            converter.add_exported_program(
                program.run_decompositions(coreai_torch.get_decomp_table()),
                input_names=list(example),
                output_names=[*outputs, "new_keys", "new_values"],
                entrypoint_name=function,
            )
        made = Path(folder, out.name)
        converter.to_coreai().save_asset(made)
        os.replace(made, out)


def run_coreai(
    package: Path, inputs: dict[str, Tensor], function: str = FUNCTIONS[0]
) -> dict[str, Tensor]:
    """Execute a function of a package on this machine's CPU.

    Args:
        inputs: by name; floating-point ones are rounded to FP16.

    Returns:
        Outputs by name, in FP16.

    Raises:
        InputError: the extra is not installed, the package is not there, or the function or its
            inputs have other names.
        CorruptError: the package is damaged.
    """
    _check_package(package)
    assets, runtime = _load("coreai.authoring"), _load("coreai.runtime")
    arrays = {name: _as_stored(value).contiguous().numpy() for name, value in inputs.items()}

    async def execute() -> dict[str, Tensor]:
        async with assets.AIModelAsset.load(package).executable() as model:
            _expect(function, model.function_names, f"{package}: functions")
            call = model.load_function(function)
            _expect(sorted(arrays), [sorted(call.desc.input_names)], f"{package}: inputs")
            results = await call({n: runtime.NDArray(a) for n, a in arrays.items()})
            # what comes back is a view of memory that belongs to the model
            return {n: torch.from_numpy(value.numpy().copy()) for n, value in results.items()}

    return asyncio.run(execute())


def _check_package(package: Path) -> None:
    """The runtime ends the whole process when it reads a damaged program, so this looks first."""
    program, stored = package / "main.mlirb", package / "main.hash"
    if not package.is_dir():
        raise InputError(f"{package} does not exist; export it first")
    if not (program.is_file() and stored.is_file()):
        raise CorruptError(f"{package} is no Core AI package; export it again")
    if sha256_file(program) != stored.read_bytes().hex():
        raise CorruptError(f"{program} is not what was saved (its checksum differs); export again")


def _expect(given: Any, allowed: Any, what: str) -> None:
    if given not in allowed:
        raise InputError(f"{what} are {allowed}, not {given}")


def _as_stored(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The packages announce themselves, and warn of torch's own deprecated calls."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _load(module: str) -> Any:
    """A module of the extra.

    Raises:
        InputError: it is not installed.
    """
    with _quiet():
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise InputError(
                "Core AI needs the optional extra 'coreai': pip install --no-deps -r "
                f"requirements-coreai.txt ({error})"
            ) from None
