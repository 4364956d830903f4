"""`lutqat convert-checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib.base.errors import InputError, MismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def convert_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(
            help="A training checkpoint of ours, or a .pt file of the reference implementation "
            "(V1 or V2).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.", show_default=False)],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Teacher folder that a .pt file was trained from: gives architecture, tokenizer "
            "and whatever tensors the file leaves out.",
            show_default=False,
        ),
    ] = None,
    keep_form: Annotated[
        bool,
        typer.Option("--keep-form", help="Leave low-rank scales (V1) of a .pt file as they are."),
    ] = False,
) -> None:
    """Turn low-rank scales (V1), group or channel scales into directional ones (V2), or read a
    reference checkpoint.

    The change of form is exact: A and B become unit directions and magnitudes |A_k| |B_k| (of
    group scales there is one rank per group, of channel scales one in all), and indices, LUTs and
    master weights stay. (Levels and ranks are changed by the stage `convert`.)

    Example: lutqat convert-checkpoint runs/finetune/model directional

    Example: lutqat convert-checkpoint model_state_dict.pt imported --base data/teacher
    """
    from lib.model.checkpoint import save_checkpoint
    from lib.model.folders import check_replaceable, is_checkpoint
    from lib.model.surgery import quantized_layers

    check_replaceable(out)
    if out.resolve() == source.resolve():
        raise InputError(f"{out} is the source itself; give another folder")
    ours = is_checkpoint(source)
    if ours and (base or keep_form):
        raise InputError(f"{source} is a checkpoint of ours: --base and --keep-form are for .pt")
    model, info = _load_ours(source) if ours else _load_foreign(source, base)
    print(f"{source}: {len(quantized_layers(model))} quantized layers")
    if not keep_form:
        change = _make_directional(model)
        print(f"scales are directional now; largest relative change of a layer's W_q: {change:.1e}")
    tokenizer = source if ours else base
    assert tokenizer is not None
    save_checkpoint(model, out, tokenizer_from=tokenizer, info=info)
    print(f"wrote {out}; `lutqat inspect {out}` shows it")


def _load_ours(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    from lib.model.checkpoint import load_checkpoint, read_config
    from lib.model.surgery import quantized_layers

    model, info = load_checkpoint(folder)
    layers = quantized_layers(model)
    if not layers or any(layer.weight is None for layer in layers.values()):
        raise MismatchError(
            f"{folder} is snapped or baked; convert the checkpoint that it was snapped from"
        )
    return model, {**info, "parent": read_config(folder)["fingerprint"]}


def _load_foreign(source: Path, base: Path | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    from lib.model.foreign import STATE_FILE, import_reference

    if source.is_dir() and not (source / STATE_FILE).is_file():
        raise InputError(f"{source} is neither a lutqat checkpoint nor a folder with {STATE_FILE}")
    if not source.exists():
        raise InputError(f"{source} does not exist; give a checkpoint folder or a .pt file")
    if base is None:
        raise InputError(
            f"{source} is no lutqat checkpoint; to read it as one of the reference implementation, "
            "give its base model: --base FOLDER (a teacher folder)"
        )
    return import_reference(source, base)


def _make_directional(model: PreTrainedModel) -> float:
    """Change every layer's form in place; returns the largest |W_q after - before| of a layer,
    relative to its largest |W_q|. (With `ste_fp16` the new factors are rounded to FP16 in their
    turn, so it is about 1e-3 there, and rounding noise otherwise.)"""
    from dataclasses import replace

    from lib.convert.convert import keep_levels
    from lib.model.surgery import quantized_layers, replace_module
    from lib.quant.spec import ScaleForm

    largest = 0.0
    for name, layer in quantized_layers(model).items():
        if layer.spec.scale is ScaleForm.DIRECTIONAL:
            continue
        rank = layer.spec.rank_of(layer.in_features)
        target = replace(layer.spec, scale=ScaleForm.DIRECTIONAL, rank=rank)
        changed = keep_levels(layer, target, seed=0)  # no rank is added, so nothing is drawn
        before, after = layer.dequantized(), changed.dequantized()
        size = before.abs().max().clamp_min(1e-30)
        largest = max(largest, float((after - before).abs().max() / size))
        replace_module(model, name, changed)
    return largest
