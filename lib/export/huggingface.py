"""The dense form: a plain Transformers folder with each ``LUT[idx] * S`` multiplied out in FP16."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import GateError, InputError
from lib.base.files import atomic_folder
from lib.export.snapped import plain_tensors, snapped_layers
from lib.model.checkpoint import TOKENIZER_FILES, WEIGHTS
from lib.model.linear import LutLinear
from lib.model.size import BITS_PER_MB, FP16_BITS, model_size
from lib.quant.spec import LinearSpec, ScaleForm

CARD = "README.md"

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {architecture}, dense FP16 form of LUT weights

lutqat trained this model so that its weights are entries of a lookup table (LUT) times scales,
`W = LUT[index] * S`. **This folder is the dense form:** every such weight is multiplied out
and stored in FP16, 16 bits per weight and {megabytes:.1f} MB. It loads wherever Transformers
folders load, and is no smaller than the model was before.

"""
_LUT_FORM = """\
The LUT form of the same model takes {bits:.2f} bits per weight ({layer_bits:.2f} in the quantized
layers alone) and {megabytes:.1f} MB:

{layers}

"""
_NO_LUT_FORM = """\
It was made from baked weights, which do not tell how many bits the LUT form takes.

"""
_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


@torch.no_grad()
def save_huggingface(model: PreTrainedModel, tokenizer_from: Path, out: Path) -> None:
    """Write a snapped model as a plain Transformers folder, atomically; ``model`` stays as it is.

    Every tensor is FP16: embeddings, norms and biases have been since they were snapped, a
    quantized weight is the FP16 rounding of ``LUT[idx] * S``. A baked model gives the same folder,
    but for the size of the LUT form in its model card.

    Args:
        tokenizer_from: folder (teacher or checkpoint) whose tokenizer and generation config are
            copied.

    Raises:
        InputError: the model is not snapped, or ``tokenizer_from`` has no tokenizer.
        GateError: a weight exceeds FP16; names it.
        MismatchError: the model's residual stream was rescaled.
    """
    layers = snapped_layers(model)
    if not (tokenizer_from / "tokenizer.json").is_file():
        raise InputError(f"{tokenizer_from} holds no tokenizer.json; give the model's own folder")
    tensors = _dense_tensors(model, layers)
    config = copy.deepcopy(model.config)
    config.dtype = torch.float16
    config.architectures = [type(model).__name__]
    with atomic_folder(out) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(temporary)
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, temporary / name)
        (temporary / CARD).write_text(_card(model, layers), encoding="utf-8")


def _dense_tensors(model: PreTrainedModel, layers: dict[str, LutLinear]) -> dict[str, Tensor]:
    """Every tensor of the plain model in FP16, by its Transformers name; tied ones once."""
    tensors = plain_tensors(model)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    tensors = {name: _half(value, name) for name, value in tensors.items()}
    for name, layer in layers.items():
        tensors[f"{name}.weight"] = _half(layer.dequantized(), f"{name}.weight")
        if layer.bias is not None:
            tensors[f"{name}.bias"] = _half(layer.bias, f"{name}.bias")
    return tensors


def _half(values: Tensor, name: str) -> Tensor:
    rounded = values.detach().half().cpu().contiguous()
    if not rounded.isfinite().all():
        raise GateError(
            f"{name} holds {float(values.abs().max()):.3g}, which FP16 cannot (65504 at most); "
            "train with quant.ste_fp16: true, which shows it in the loss"
        )
    return rounded


def _scales(spec: LinearSpec) -> str:
    if spec.scale is ScaleForm.GROUP:
        return f"one scale per {spec.group_size} inputs"
    if spec.scale is ScaleForm.CHANNEL:
        return "one scale per output"
    return f"{spec.scale.value} scales of rank {spec.rank}"


def _card(model: PreTrainedModel, layers: dict[str, LutLinear]) -> str:
    """The model card: what the folder is, and what the same model takes in LUT form."""
    size = model_size(model)
    dense = FP16_BITS * size.weights / BITS_PER_MB
    head = _HEAD.format(architecture=type(model).__name__, megabytes=dense)
    if not layers:
        return head + _NO_LUT_FORM + _USE
    kinds = Counter(
        f"a {layer.spec.lut_size}-entry LUT ({layer.spec.bits} bits) and " + _scales(layer.spec)
        for layer in layers.values()
    )
    lut_form = _LUT_FORM.format(
        bits=size.bits_per_weight,
        layer_bits=size.bits_per_layer_weight,
        megabytes=size.megabytes,
        layers="\n".join(f"- {count} layers with {kind}" for kind, count in kinds.items()),
    )
    return head + lut_form + _USE
