"""What a model takes when stored: every bit counted.

A quantized layer costs log2(LUT size) bits per weight, and 16 bits for each LUT entry, scale
factor, magnitude and bias. Everything else (embeddings, norms, unquantized layers) costs 16 bits
per parameter; tied parameters are counted once. Adapters add bits, and no weights of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lib.model.surgery import adapter_owner, quantized_layers

FP16_BITS = 16
BITS_PER_MB = 8e6


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Bits and the weights they stand for.

    Attributes:
        layer_bits, layer_weights: quantized layers alone; both 0 where there are none.
        bits, weights: the whole model.
    """

    layer_bits: int
    layer_weights: int
    bits: int
    weights: int

    @property
    def bits_per_layer_weight(self) -> float | None:
        """Bits per weight of the quantized layers; None where there are none."""
        return self.layer_bits / self.layer_weights if self.layer_weights else None

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the whole model."""
        return self.bits / self.weights

    @property
    def megabytes(self) -> float:
        """Stored size, 10^6 bytes."""
        return self.bits / BITS_PER_MB


def model_size(model: nn.Module) -> ModelSize:
    """Count a model that has not been baked (baking hides how a weight is stored)."""
    layer_bits = layer_weights = bias_weights = 0
    inside: set[int] = set()
    for layer in quantized_layers(model).values():
        weights = layer.indices.numel()
        biases = 0 if layer.bias is None else layer.bias.numel()
        factors = sum(parameter.numel() for parameter in layer.scale.parameters())
        layer_bits += weights * layer.spec.bits + FP16_BITS * (factors + layer.lut.numel() + biases)
        layer_weights += weights
        bias_weights += biases
        inside.update(id(parameter) for parameter in layer.parameters())
    others = adapters = 0
    for name, parameter in model.named_parameters():
        if adapter_owner(name) is not None:
            adapters += parameter.numel()
        elif id(parameter) not in inside:
            others += parameter.numel()
    return ModelSize(
        layer_bits=layer_bits,
        layer_weights=layer_weights,
        bits=layer_bits + FP16_BITS * (others + adapters),
        weights=layer_weights + bias_weights + others,
    )


def folder_megabytes(folder: Path) -> float:
    """Size of all files under ``folder``, 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
