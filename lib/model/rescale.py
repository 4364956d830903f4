"""The residual stream made smaller by a power of two, without changing the function.

    embedding * alpha,  o_proj * alpha,  down_proj * alpha     what is added to the stream
    eps * alpha^2                                              of every norm that reads it

An RMSNorm of alpha * x with eps * alpha^2 is the norm of x with eps, so every block sees what it
saw. With tied embeddings the head is scaled as well, which the last norm's gain makes up for.
A power of two moves exponents only: nothing is rounded, short of FP16 subnormals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lib.base.errors import InputError
from lib.model.linear import LutLinear
from lib.model.norms import EPS_NAMES, rms_gain
from lib.model.surgery import projections

_WRITERS = ("o_proj", "down_proj")
_READERS = ("input_layernorm", "post_attention_layernorm")
_APART = ("q_norm", "k_norm")  # norms inside attention, which do not see the stream


@dataclass(frozen=True, kw_only=True)
class ResidualStream:
    """Names of the modules that write the residual stream, carry it, and read it.

    Attributes:
        embedding: the input embedding.
        writers: projections whose outputs are added.
        blocks: decoder blocks, which add.
        norms: norms of the blocks, in the order they run.
        final_norm: the norm before the head.
    """

    embedding: str
    writers: tuple[str, ...]
    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    final_norm: str

    @property
    def readers(self) -> tuple[str, ...]:
        """Every norm whose input is the stream."""
        return (*self.norms, self.final_norm)

    def __contains__(self, name: object) -> bool:
        return name == self.embedding or name in (*self.writers, *self.blocks, *self.readers)


def residual_stream(model: PreTrainedModel) -> ResidualStream:
    """Find the stream of a decoder with two norms per block (Llama, Qwen, Mistral, ...).

    Raises:
        InputError: the decoder is built in another way; what differs is named.
    """
    decoder = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    norms = [name for name, module in model.named_modules() if rms_gain(module) is not None]
    inside = tuple(n for n in norms if n.rsplit(".", 1)[-1] in _READERS)
    other = [n for n in norms if n not in inside and n.rsplit(".", 1)[-1] not in _APART]
    writers = tuple(n for n in projections(model) if n.rsplit(".", 1)[-1] in _WRITERS)
    blocks = tuple(names[block] for block in decoder.layers)
    expected = {f"{block}.{norm}" for block in blocks for norm in _READERS}
    if set(inside) != expected or len(other) != 1 or len(writers) != 2 * len(blocks):
        beside = [name for name in other if name.startswith(blocks)]
        strange = [*sorted(expected.symmetric_difference(inside)), *beside]
        raise InputError(
            f"the residual stream of {type(model).__name__} is not known: expected "
            f"{' and '.join(_READERS)}, {' and '.join(_WRITERS)} in every block and one norm "
            f"behind them, it differs in {strange[0] if strange else 'its projections'}; set "
            "ane_check.remedy to none"
        )
    return ResidualStream(
        embedding=names[model.get_input_embeddings()],
        writers=writers,
        blocks=blocks,
        norms=inside,
        final_norm=other[0],
    )


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the embedding's."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def scale_residual(model: PreTrainedModel, alpha: float) -> None:
    """Multiply the residual stream by ``alpha``, in place; the model computes what it did.

    Indices and LUTs are not touched: a quantized layer takes ``alpha`` in its factor A, its
    magnitudes g or its scales s per group or output, and in its bias.

    Args:
        alpha: a power of two.

    Raises:
        ValueError: ``alpha`` is not a power of two.
        InputError: see :func:`residual_stream`.
    """
    if alpha <= 0 or math.frexp(alpha)[0] != 0.5:
        raise ValueError(f"alpha must be a power of two, not {alpha}")
    stream = residual_stream(model)
    tied = is_tied(model)
    model.get_parameter(f"{stream.embedding}.weight").mul_(alpha)
    for name in stream.writers:
        _scale_layer(model.get_submodule(name), alpha)
    if tied:
        _scale_gain(model.get_submodule(stream.final_norm), 1 / alpha)
    for name in stream.readers:
        _scale_eps(model.get_submodule(name), alpha**2)


def _scale_layer(layer: nn.Module, alpha: float) -> None:
    """Multiply what a projection computes."""
    if isinstance(layer, LutLinear):
        layer.scale.multiply(alpha)
    if isinstance(layer.weight, nn.Parameter):
        layer.weight.mul_(alpha)
    if isinstance(layer.bias, nn.Parameter):
        layer.bias.mul_(alpha)


def _scale_gain(norm: nn.Module, factor: float) -> None:
    found = rms_gain(norm)
    assert found is not None and isinstance(norm.weight, nn.Parameter)
    gain, _ = found
    offset = 0.0 if torch.equal(gain, norm.weight) else 1.0  # Gemma stores w - 1
    norm.weight.copy_(gain * factor - offset)


def _scale_eps(norm: nn.Module, factor: float) -> None:
    for name in EPS_NAMES:
        if hasattr(norm, name):
            setattr(norm, name, getattr(norm, name) * factor)


def choose_alpha(peaks: Iterable[float], limit: float) -> float:
    """The largest power of two, at most 1, that brings every magnitude to ``limit`` or below.

    Raises:
        ValueError: a peak is not finite.
    """
    largest = 0.0
    for peak in peaks:
        if not math.isfinite(peak):
            raise ValueError(f"no alpha helps against a magnitude of {peak}")
        largest = max(largest, peak)
    if largest <= limit:
        return 1.0
    return 2.0 ** math.floor(math.log2(limit / largest))
