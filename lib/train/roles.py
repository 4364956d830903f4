"""Which parameters a stage trains: roles, their learning rates, and exceptions by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lib.base.errors import ParamsError
from lib.model.linear import LutLinear, ParameterRole
from lib.model.surgery import adapter_owner, block_number, is_mlp, quantized_layers
from lib.params.training import LoopConfig, TrainConfig
from lib.quant.spec import Codebook

_SCALE_ROLES = (ParameterRole.SCALE_DIRECTION, ParameterRole.SCALE_MAGNITUDE)

MARGIN = 0.1
"""Share of a cell, from its edge, that masters leave before they train together with scales."""


@dataclass(frozen=True)
class Trainable:
    """One parameter that trains."""

    name: str
    parameter: nn.Parameter
    role: ParameterRole
    layer: nn.Module
    """The quantized layer, or PEFT's layer around one."""
    local_name: str
    """Its name inside the layer."""


def _layer_trains(name: str, last_block: int, params: LoopConfig) -> bool:
    if not isinstance(params, TrainConfig):
        return True  # roles alone decide
    if not is_mlp(name):
        value_or_output = name.rsplit(".", 1)[-1] in ("v_proj", "o_proj")
        return not params.train_mlp_only and not (params.freeze_value_output and value_or_output)
    return block_number(name) <= last_block - params.freeze_last_mlp


def select(model: nn.Module, params: LoopConfig) -> list[Trainable]:
    """The parameters a stage trains, in the model's order; sets ``requires_grad`` accordingly.

    A role with rate 0 is frozen; a LUT trains only where the codebook is ``learned``.

    Raises:
        ParamsError: nothing is left to train, or weights of a snapped model were asked for.
    """
    layers = quantized_layers(model)
    rates: dict[ParameterRole, float] = role_rates(params)
    model.requires_grad_(False)
    chosen: list[Trainable] = []
    last_block = max((block_number(name) for name in layers), default=0)
    for layer_name, layer in layers.items():
        if not _layer_trains(layer_name, last_block, params):
            continue
        for name, role in layer.roles().items():
            fixed_lut = role is ParameterRole.LUT and layer.spec.codebook is not Codebook.LEARNED
            if rates.get(role, 0.0) > 0 and not fixed_lut:
                parameter = layer.get_parameter(name)
                parameter.requires_grad_(True)
                chosen.append(Trainable(f"{layer_name}.{name}", parameter, role, layer, name))
    if rates[ParameterRole.ADAPTER] > 0:
        chosen += _adapters(model)
    if not chosen:
        raise ParamsError(
            "nothing trains: every rate is 0 for the roles this model has "
            "(rates.lut needs quant.codebook: learned; rates.scale_magnitude needs "
            "scale: directional or channel); set a rate above 0"
        )
    return chosen


def _adapters(model: nn.Module) -> list[Trainable]:
    found = []
    for name, parameter in model.named_parameters():
        owner = adapter_owner(name)
        if owner is not None:
            parameter.requires_grad_(True)
            local = name.removeprefix(f"{owner}.")
            layer = model.get_submodule(owner)
            found.append(Trainable(name, parameter, ParameterRole.ADAPTER, layer, local))
    return found


def current(trainables: list[Trainable], model: nn.Module) -> list[Trainable]:
    """The same roles with the layers and parameters that ``model`` has now: sharding replaces
    parameters."""
    found = []
    for item in trainables:
        layer = model.get_submodule(item.name.removesuffix(f".{item.local_name}"))
        parameter = layer.get_parameter(item.local_name)
        found.append(replace(item, layer=layer, parameter=parameter))
    return found


def role_rates(params: LoopConfig) -> dict[ParameterRole, float]:
    """Learning rate per role."""
    return {role: params.rate_of(role) for role in ParameterRole}


def _lut_layer(item: Trainable) -> LutLinear:
    assert isinstance(item.layer, LutLinear)  # nothing else has master weights
    return item.layer


def settle_before(trainables: list[Trainable]) -> None:
    """Make masters that will train agree with the indices their layers hold; where scales train
    too, keep them off the edges of their cells, or the first changes of S would flip many."""
    together = any(item.role in _SCALE_ROLES for item in trainables)
    for item in trainables:
        if item.role is ParameterRole.WEIGHT:
            _lut_layer(item).rebase_weight(MARGIN if together else 0.0)


def settle_after(trainables: list[Trainable]) -> None:
    """Store the indices that trained masters now have."""
    for item in trainables:
        if item.role is ParameterRole.WEIGHT:
            _lut_layer(item).refresh_indices()
