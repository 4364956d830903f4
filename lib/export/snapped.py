"""What checkpoints are exported from: a snapped model, split into quantized layers and the rest."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.model.linear import LutLinear
from lib.model.norms import EPS_NAMES
from lib.model.surgery import quantized_layers


def snapped_layers(model: PreTrainedModel) -> dict[str, LutLinear]:
    """Every quantized layer by name, in the model's order; none in a baked model.

    Raises:
        InputError: a layer still trains.
        MismatchError: a norm's eps is not the config's, by which others build the model.
    """
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if layer.weight is not None:
            raise InputError(
                f"{name} has a master weight, so the model is not snapped; snap it, "
                "or give runs/snap/model"
            )
    _check_eps(model)
    return layers


def _check_eps(model: PreTrainedModel) -> None:
    wanted = getattr(model.config.get_text_config(), "rms_norm_eps", None)
    for name, module in model.named_modules():
        found = next((getattr(module, key) for key in EPS_NAMES if hasattr(module, key)), wanted)
        if found != wanted:
            raise MismatchError(
                f"{name} has eps {found}, the model's config {wanted}: the residual stream was "
                "rescaled, which the config cannot say; export this format from the model before"
            )


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors outside the quantized layers, by name: embeddings, norms, unquantized layers.

    A tied output layer is there under both of its names, as one storage.
    """
    inside = {
        f"{name}.{key}"
        for name, layer in quantized_layers(model).items()
        for key in layer.state_dict()
    }
    state = model.state_dict()
    return {name: value.detach().cpu() for name, value in state.items() if name not in inside}
