"""Replacing a model's linear layers by quantized ones and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lib.base.errors import InputError, MismatchError
from lib.base.progress import track
from lib.model.feedback import feed_back
from lib.model.linear import LutLinear, ParameterRole
from lib.quant.spec import LinearSpec, ModelSpec

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ADAPTER = ".lora_"  # in the names of PEFT's adapter parameters
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


def is_mlp(name: str) -> bool:
    """Whether a module name is that of an MLP projection."""
    return name.rsplit(".", 1)[-1] in MLP_PROJECTIONS


def adapter_owner(name: str) -> str | None:
    """Name of the layer beside which an adapter's parameter stands; None for other parameters."""
    owner, mark, _ = name.partition(_ADAPTER)
    return owner if mark else None


def block_number(name: str) -> int:
    """Index of the decoder block that a module belongs to.

    Raises:
        InputError: the name has no ``.layers.N.`` part.
    """
    match = _LAYER_NUMBER.search(name)
    if match is None:
        raise InputError(f"{name} is not inside a decoder block (no .layers.N. in its name)")
    return int(match.group(1))


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """The q/k/v/o and gate/up/down projections of every decoder block, quantized or not."""
    wanted = MLP_PROJECTIONS + ATTENTION_PROJECTIONS
    return {
        name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in wanted and isinstance(module, nn.Linear | LutLinear)
    }


def quantized_layers(model: nn.Module) -> dict[str, LutLinear]:
    """Every quantized layer by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LutLinear)}


def has_masters(model: nn.Module) -> bool:
    """Whether the model is quantized and can train: every quantized layer has its master weight
    (a snapped one has none)."""
    layers = quantized_layers(model).values()
    return bool(layers) and all(layer.weight is not None for layer in layers)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` points."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def master_linear(layer: LutLinear) -> nn.Linear:
    """A plain layer that computes with the master weight itself: the same parameters, not copies.

    Raises:
        MismatchError: the layer is snapped and has none.
    """
    if layer.weight is None:
        raise MismatchError("a snapped layer has no master weight to compute with")
    plain = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    plain.weight, plain.bias = layer.weight, layer.bias  # type: ignore[assignment]
    return plain


def spec_for(name: str, spec: ModelSpec) -> LinearSpec | None:
    """The spec of one projection, None if it stays unquantized."""
    return spec.mlp if is_mlp(name) else spec.attention


def replace_layers(
    model: nn.Module,
    modules: dict[str, nn.Module],
    make: Callable[[str, nn.Module], nn.Module],
    label: str,
) -> None:
    """Replace each module by ``make(name, module)``, in place, one after the other.

    Sequential on purpose: torch's kernels use the cores, and the result depends on no schedule.
    """
    for name, module in track(modules.items(), len(modules), label):
        replace_module(model, name, make(name, module))


def quantize_model(
    model: nn.Module, spec: ModelSpec, moments: Mapping[str, Tensor] | None = None
) -> None:
    """Replace the decoder's projections by :class:`LutLinear` layers, in place.

    With ``ste_fp16`` the parameters that stay (embeddings, norms, biases) are rounded to FP16
    too, once: the whole model is then what the device will hold.

    Args:
        moments: E[x^2] or E[x x^T] per layer (:func:`lib.model.calibrate.input_moments`), where
            the spec asks for refits or error feedback.

    Raises:
        InputError: the model has no projections to quantize, or a value exceeds FP16.
        ParamsError: the rank does not fit a layer (the layer is named).
    """
    targets: dict[str, nn.Module] = {
        name: module
        for name, module in projections(model).items()
        if isinstance(module, nn.Linear) and spec_for(name, spec) is not None
    }
    if not targets:
        raise InputError(
            "the model has no q/k/v/o or gate/up/down projections to quantize; "
            "use a decoder of the Llama or Qwen family"
        )

    def make(name: str, module: nn.Module) -> nn.Module:
        linear_spec = spec_for(name, spec)
        assert linear_spec is not None and isinstance(module, nn.Linear)
        used = None if moments is None else moments[name]
        return LutLinear.from_weight(module.weight, module.bias, linear_spec, name, used)

    replace_layers(model, targets, make, "quantizing layers")
    feed_back(quantized_layers(model), moments)
    if spec.mlp.ste_fp16:
        _round_rest(model)


@torch.no_grad()
def _round_rest(model: nn.Module) -> None:
    """Round every parameter outside the quantized layers, and biases, to FP16."""
    layers = quantized_layers(model)
    inside = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    biases = {f"{name}.bias" for name in layers}
    for name, parameter in model.named_parameters():
        if name not in inside or name in biases:
            rounded = parameter.half().float()
            if not rounded.isfinite().all():
                raise InputError(
                    f"{name} holds {float(parameter.abs().max()):.0f}, beyond FP16's 65504; "
                    "set quant.ste_fp16 to false, or rescale that tensor"
                )
            parameter.copy_(rounded)


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Replace every quantized layer by a plain one with its dequantized weight, in place."""
    for name, layer in quantized_layers(model).items():
        weight = layer.dequantized()
        plain = nn.Linear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = layer.bias
        replace_module(model, name, plain)


def parameter_roles(model: nn.Module) -> dict[str, ParameterRole]:
    """Role of every parameter; what belongs to no quantized layer and no adapter is FROZEN."""
    layers = quantized_layers(model)
    roles = {
        name: ParameterRole.ADAPTER if adapter_owner(name) else ParameterRole.FROZEN
        for name, _ in model.named_parameters()
    }
    for layer_name, layer in layers.items():
        roles.update({f"{layer_name}.{name}": role for name, role in layer.roles().items()})
    return roles
