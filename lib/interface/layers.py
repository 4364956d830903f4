"""Training layer by layer from Python."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lib.base.device import resolve_device
from lib.base.errors import ParamsError
from lib.interface.support import info_of, section, set_info, training_data
from lib.model.blocks import decoder_blocks, master_block, part
from lib.params.base import Count, NotNegative, Positive, Section
from lib.params.data import Run
from lib.params.methods import Layerwise
from lib.params.training import Scales
from lib.train.by_block import Task, train_by_block
from lib.train.layerwise import LayerwiseMethod
from lib.train.log import reporting, result_of


class LayerTraining(Section):
    """How layers train; keys as in the reference implementation."""

    device: str = "auto"
    """`auto`, `cpu`, `mps`, `cuda` or `cuda:N`."""
    batch_size: Count = 4
    """Sequences per forward pass."""
    lr: Positive = 1e-3
    """Learning rate of all that trains; weights want 2e-5."""
    max_steps: Count = 100
    """Optimizer steps per layer."""
    grad_accum: Count = 4
    """Forward passes per optimizer step."""
    temperature: Positive = 2.0
    """Of the distillation loss."""
    train_weights: bool = False
    """Train master weights."""
    train_scales: bool = True
    """Train scales."""
    local_weight: NotNegative = 0.5
    """Weight of the MLP's reconstruction."""
    global_weight: NotNegative = 0.5
    """Weight of the distillation loss at the end of the model."""
    hard_top1_weight: NotNegative = 0.0
    """Weight of the cross entropy on the teacher's top-1 candidate; weights want 0.1."""
    hard_full_weight: NotNegative = 0.0
    """The same over the full vocabulary."""

    def as_training(self) -> dict[str, Any]:
        """The keys of a training section that say the same."""
        scale_rate = self.lr if self.train_scales else 0.0
        return {
            "steps": self.max_steps,
            "batch_size": self.batch_size,
            "grad_accum": self.grad_accum,
            "eval_every": self.max_steps,
            "hard_top1_weight": self.hard_top1_weight,
            "hard_full_weight": self.hard_full_weight,
            "rates": {
                "weight": self.lr if self.train_weights else 0.0,
                "scale_direction": scale_rate,
                "scale_magnitude": scale_rate,
            },
        }


def train_layer(
    model: PreTrainedModel,
    layer_idx: int,
    cache_dir: str | Path,
    *,
    teacher: PreTrainedModel | None = None,
    **training: Any,
) -> dict[str, float | int]:
    """Train one decoder layer in place, by its MLP's outputs and by the whole model's.

    Args:
        layer_idx: number of the layer, from 0.
        cache_dir: folder of :func:`make_cache` or of the stage `cache`, of the model's teacher.
        teacher: whose MLPs are the aim; None = the layer's master weights as they are now.
        training: see :func:`train_all_layers`.

    Returns, raises: see :func:`train_all_layers`.
    """
    count = len(decoder_blocks(model))
    if not 0 <= layer_idx < count:
        raise ParamsError(
            f"train_layer: layer_idx {layer_idx}: the model has layers 0 to {count - 1}"
        )
    return _train_layers(model, [layer_idx], Path(cache_dir), teacher, training)


def train_all_layers(
    model: PreTrainedModel,
    cache_dir: str | Path,
    *,
    teacher: PreTrainedModel | None = None,
    **training: Any,
) -> dict[str, float | int]:
    """Train every decoder layer in place, from the first to the last.

    Args:
        cache_dir, teacher: see :func:`train_layer`.
        training: fields of :class:`LayerTraining`: device, batch_size, lr, max_steps, grad_accum,
            temperature, train_weights, train_scales, local_weight, global_weight,
            hard_top1_weight, hard_full_weight.

    Returns:
        initial_kd and final_kd of the whole model (mean held-out loss, nats), steps.

    Raises:
        ParamsError: a key or value is not possible, or nothing would train.
        MismatchError: the cache is another teacher's, or the model is snapped.
        NonFiniteError: a loss or gradient became NaN or infinite; names layer and step.
    """
    layers = range(len(decoder_blocks(model)))
    return _train_layers(model, layers, Path(cache_dir), teacher, training)


def _train_layers(
    model: PreTrainedModel,
    layers: Sequence[int],
    cache: Path,
    teacher: PreTrainedModel | None,
    training: dict[str, Any],
) -> dict[str, float | int]:
    asked = section(LayerTraining, training, "train_layer")
    params = section(Scales, asked.as_training(), "train_layer")
    weights = {"local_weight": asked.local_weight, "global_weight": asked.global_weight}
    layerwise = section(Layerwise, weights, "train_layer")
    data = training_data(model, cache, params, asked.temperature, "candidates")

    def full(number: int) -> nn.Module:
        if teacher is not None:
            return part(teacher, number, number + 1, norm=False)
        return master_block(model, number)

    device = resolve_device(asked.device)
    steps, tokens = asked.max_steps * len(layers), params.batch_size * params.grad_accum
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        task = Task(model, params, data.loss, data.rows, data.val, device, scratch)
        method = LayerwiseMethod(task, full=full, layerwise=layerwise, numbers=layers)
        length = data.cache.spec.max_length
        with reporting(
            "layers", steps, scratch, Run(), {}, tokens_per_step=tokens * length
        ) as report:
            result = result_of(train_by_block(method, scratch, report))
    model.cpu()
    set_info(model, {**info_of(model), "stage": "train_layer", "cache": data.cache.fingerprint})
    return {key: result[key] for key in ("initial_kd", "final_kd", "steps")}
