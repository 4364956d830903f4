"""How the inputs of each projection are used over calibration text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError
from lib.base.files import atomic_file
from lib.base.progress import track
from lib.model.surgery import projections, quantize_model
from lib.quant.spec import ModelSpec, Moments

BATCH = 8  # sequences at a time
SAVE_SECONDS = 60.0  # a killed run loses no more than this


class MomentSums:
    """Sums over tokens of x^2, or of x x^T, of the inputs of every layer.

    Layers that are given the same tensor (q, k and v; gate and up) share one sum.
    """

    def __init__(self, *, full: bool) -> None:
        self.full = full
        self.sums: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}
        self._latest: tuple[Tensor, str] | None = None

    def add(self, name: str, given: Tensor, real: Tensor) -> None:
        """Count the inputs ``given [B, L, in]`` of a layer, where ``real [B, L]``."""
        if self._latest is not None and self._latest[0] is given:
            self.owner[name] = self._latest[1]
            return
        self._latest, self.owner[name] = (given, name), name
        x = given.detach().float()[real.to(given.device)]  # [tokens, in]
        total = (x.T @ x).cpu() if self.full else x.square().sum(dim=0).cpu().double()
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def means(self, tokens: int) -> dict[str, Tensor]:
        """The mean for every layer, float32.

        Raises:
            NonFiniteError: one is not finite; the layer is named.
        """
        for name, total in self.sums.items():
            if not total.isfinite().all():
                raise NonFiniteError(f"an input of {name} is not finite during calibration")
        means = {name: (total / tokens).float() for name, total in self.sums.items()}
        return {name: means[owner] for name, owner in self.owner.items()}

    def save(self, file: Path, batches: int) -> None:
        """Keep what ``batches`` have added up to."""
        meta = {"owner": json.dumps(self.owner), "batches": str(batches)}
        with atomic_file(file) as temporary:
            save_file(self.sums, temporary, meta)

    def restore(self, file: Path) -> int:
        """Take up what :meth:`save` kept, if anything; returns the batches in it."""
        if not file.exists():
            return 0
        with safe_open(file, framework="pt") as kept:
            meta = kept.metadata()
            self.sums = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        self.owner = json.loads(meta["owner"])
        return int(meta["batches"])


@torch.no_grad()
def input_moments(
    model: PreTrainedModel,
    input_ids: Tensor,
    lengths: Tensor,
    *,
    full: bool,
    resume: Path | None = None,
) -> dict[str, Tensor]:
    """Mean squared input per projection, ``{layer name: [in]}``, float32 on the CPU.

    Args:
        input_ids: long ``[N, L]``, right-padded; lengths: ``[N]`` real tokens of each. Sums run
            in a fixed order.
        full: products of different inputs too: the mean of x x^T, ``[in, in]``. Layers with the
            same inputs get the same tensor; all are in memory at once, 4 bytes per entry.
        resume: file in which a killed run of the same model and text left its sums, and this one
            leaves them once a minute.

    Raises:
        NonFiniteError: an activation is not finite; the layer is named.
    """
    sums = MomentSums(full=full)
    device = next(model.parameters()).device
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]  # [N, L]
    now = slice(0, BATCH)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            sums.add(name, inputs[0], real[now])

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name)) for name, module in projections(model).items()
    ]
    total = -(-len(input_ids) // BATCH)
    done = 0 if resume is None else sums.restore(resume)
    saved = time.monotonic()
    try:
        for batch in track(range(done, total), total - done, "calibration batches"):
            now = slice(batch * BATCH, (batch + 1) * BATCH)
            model.base_model(input_ids=input_ids[now].to(device), use_cache=False)
            if resume is not None and time.monotonic() - saved >= SAVE_SECONDS:
                sums.save(resume, batch + 1)
                saved = time.monotonic()
    finally:
        for handle in handles:
            handle.remove()
    return sums.means(int(real.sum()))


Text = Callable[[], tuple[Tensor, Tensor]]
"""Gives ids ``[N, L]`` and lengths ``[N]``."""


def quantize_calibrated(model: PreTrainedModel, spec: ModelSpec, text: Text) -> None:
    """Quantize a model in place, by its activations if the spec asks for that.

    Args:
        text: asked only if so.

    Raises:
        NonFiniteError: see :func:`input_moments`.
        InputError, ParamsError: see :func:`lib.model.surgery.quantize_model`.
    """
    moments = None
    if spec.needs is not Moments.NONE:
        moments = input_moments(model, *text(), full=spec.needs is Moments.PRODUCTS)
    quantize_model(model, spec, moments)
