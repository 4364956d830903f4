"""Core ML packages from the static graph: exact LUTs, FP16 arithmetic, the cache as state.

The converter is told the LUT of each weight by buffers with documented names (`_COREML_/...`); it
stores indices and LUT as they are, where clustering the weights again would move the levels.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lib.base.errors import InputError
from lib.export.graph import DeployedDecoder, step_inputs
from lib.export.layers import FactoredConv
from lib.export.merge import make_reproducible, merge_packages

Target = Literal["iOS18", "iOS16"]
LUT_SIZES = (2, 4, 8, 16, 64, 256)
"""Indices of 5 and 7 bits have no type in Core ML."""

PALETTIZED = 2  # coremltools' number for a weight that is given by a LUT

PASSES = [
    f"common::{name}"
    for name in (
        *("update_output_dtypes", "cast_optimization", "noop_elimination", "const_elimination"),
        *("sanitize_input_output_names", "const_deduplication", "add_fp16_cast"),
        *("update_output_dtypes", "cast_optimization", "canonicalize_inplace_pattern"),
        *("prefer_state_in_downstream", "const_elimination", "const_deduplication"),
        *("dead_code_elimination", "dedup_op_and_var_names", "topological_reorder"),
    )
]
"""The converter's passes that this graph needs. The full list of 95 takes several times as long,
and some of it does harm: `fuse_conv_scale` folds factors into a dense copy of Q."""

_WORTH_A_PROCESS = 50e6  # bytes of graph; smaller ones are converted sooner than a process starts


class _WithState(nn.Module):
    """The graph with its cache in two buffers, which the converter turns into state."""

    def __init__(self, decoder: DeployedDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        keys, values = decoder.empty_cache()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)

    keys: Tensor
    values: Tensor

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, write: Tensor) -> Any:
        *logits, keys, values = self.decoder(ids, positions, mask, write, self.keys, self.values)
        self.keys[:] = keys  # the converter knows assignments to slices only
        self.values[:] = values
        return tuple(logits)


@contextlib.contextmanager
def _told_luts(decoder: DeployedDecoder) -> Iterator[None]:
    """The buffers by which the converter learns of LUTs, while the block runs."""
    layers = [module for module in decoder.modules() if isinstance(module, FactoredConv)]
    for layer in layers:
        layer.register_buffer("_COREML_/weight/compression_type", torch.tensor([PALETTIZED]))
        layer.register_buffer("_COREML_/weight/lut", layer.lut.clone().reshape(1, 1, 1, 1, -1, 1))
    try:
        yield
    finally:
        for layer in layers:
            del layer._buffers["_COREML_/weight/compression_type"]
            del layer._buffers["_COREML_/weight/lut"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """coremltools warns of versions it has not seen and of its own deprecated calls, and shows a
    progress bar per set of passes."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def import_coremltools() -> Any:
    """The package, without what it prints on import.

    Raises:
        InputError: it is not installed (there is no wheel for some platforms).
    """
    with _quiet():
        try:
            import coremltools
        except ImportError:
            raise InputError(
                "coremltools is not installed here; install it, or leave coreml out of "
                "export.formats"
            ) from None
    return coremltools


def save_package(decoder: DeployedDecoder, out: Path, *, tokens: int, target: Target) -> None:
    """Write an ``.mlpackage`` of two functions: ``prefill`` (``tokens`` at a time) and ``decode``.

    ``decode`` takes one token; both share one copy of the weights. With iOS18 the cache is state;
    iOS16 has neither state nor several functions, so there ``out`` has ``tokens`` at a time as its
    only function ``main``, and the cache is an input and an output.

    Raises:
        InputError: coremltools is not installed, a LUT has a size that Core ML does not store, or
            a converter was killed.
    """
    import_coremltools()
    for name, layer in decoder.layers().items():
        if len(layer.lut) not in LUT_SIZES:
            sizes = ", ".join(map(str, LUT_SIZES))
            raise InputError(f"{name} has a LUT of {len(layer.lut)}; Core ML stores {sizes} only")
    counts = {"main": tokens} if target == "iOS16" else {"prefill": tokens, "decode": 1}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        graph = Path(folder, "graph.pt")
        _trace(decoder, graph, target)
        jobs = {
            name: _Job(
                graph=graph,
                out=Path(folder, f"{name}.mlpackage"),
                tokens=count,
                cache_shape=decoder.cache_shape,
                slices=len(decoder.head),
                target=target,
            )
            for name, count in counts.items()
        }
        _convert_all(list(jobs.values()), large=graph.stat().st_size > _WORTH_A_PROCESS)
        if target == "iOS16":
            jobs["main"].out.rename(out)
            make_reproducible(out)
            return
        scratch = Path(folder, "merged")
        scratch.mkdir()
        parts = {name: job.out for name, job in jobs.items()}
        with _quiet():
            merge_packages(parts, out, default="decode", scratch=scratch)


def _trace(decoder: DeployedDecoder, out: Path, target: Target) -> None:
    """The graph as TorchScript. It asks for no shape, so that a trace of one token serves all."""
    module: nn.Module = _WithState(decoder) if target == "iOS18" else decoder
    example = list(step_inputs([0], 0, 1, decoder.slots).named().values())
    if target == "iOS16":
        example += decoder.empty_cache()
    with _quiet(), _told_luts(decoder), torch.no_grad():
        torch.jit.save(torch.jit.trace(module.eval(), tuple(example), check_trace=False), out)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One function to convert: what a process of its own needs to know."""

    graph: Path
    out: Path
    tokens: int
    cache_shape: tuple[int, int, int, int]
    slices: int
    target: Target


def _convert_all(jobs: list[_Job], *, large: bool) -> None:
    """Convert at the same time where that is worth the start of processes."""
    print(f"Core ML: converting {len(jobs)} function(s)", file=sys.stderr)
    if not large or len(jobs) == 1:
        for job in jobs:
            _convert(job)
        return
    # spawn: PyTorch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(jobs), mp_context=context) as pool:
        try:
            list(pool.map(_convert, jobs))
        except BrokenProcessPool:
            raise InputError(
                f"a converter was killed, probably for memory: {len(jobs)} run at the same time; "
                "free some, or give the machine more"
            ) from None


def _convert(job: _Job) -> None:
    """Convert and save one function."""
    ct = import_coremltools()
    slots = job.cache_shape[3]
    example = step_inputs([0] * job.tokens, 0, job.tokens, slots).named()
    inputs = [
        ct.TensorType(name, shape=tuple(value.shape), dtype=_dtype(value))
        for name, value in example.items()
    ]
    cache = {
        name: ct.TensorType(shape=job.cache_shape, dtype=np.float16) for name in ("keys", "values")
    }
    outputs = [f"logits_{number}" for number in range(job.slices)]
    states = None
    if job.target == "iOS18":
        states = [ct.StateType(kind, name=name) for name, kind in cache.items()]
    else:
        for name, kind in cache.items():
            kind.name = name
            inputs.append(kind)
        outputs += ["new_keys", "new_values"]
    with _quiet():
        package = ct.convert(
            torch.jit.load(job.graph),
            convert_to="mlprogram",
            inputs=inputs,
            outputs=[ct.TensorType(name, dtype=np.float16) for name in outputs],
            states=states,
            minimum_deployment_target=getattr(ct.target, job.target),
            compute_precision=ct.precision.FLOAT16,
            pass_pipeline=ct.PassPipeline(PASSES, "exact"),
            skip_model_load=True,  # Core ML itself exists on macOS only
        )
        package.save(str(job.out))


def _dtype(value: Tensor) -> Any:
    return np.float16 if value.is_floating_point() else np.int32
