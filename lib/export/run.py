"""Export from folder to folder: every format that was asked for, then the gate."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.base.files import atomic_folder, read_json
from lib.export.anemll import save_anemll
from lib.export.audit import audit_package
from lib.export.coreai import run_coreai, save_coreai
from lib.export.coreml import save_package
from lib.export.gate import calls, check_package, compare, model_logits
from lib.export.graph import DeployedDecoder, cache_of, join_logits, step_inputs
from lib.export.huggingface import save_huggingface
from lib.export.names import AIMODEL, EXPECTED, PACKAGE, SETTINGS
from lib.export.package import Package
from lib.export.report import ExportReport
from lib.model.checkpoint import load_checkpoint
from lib.model.load import load_causal_lm
from lib.model.rescale import scale_residual
from lib.model.size import folder_megabytes, model_size
from lib.model.surgery import has_masters
from lib.params.export import SINGLE_STEPS, Export


def export_model(
    checkpoint: Path, deployment: Path, texts: list[list[int]], out: Path, params: Export
) -> ExportReport:
    """Write ``out/FORMAT`` for every format, replacing ``out`` whole, and check them.

    Args:
        checkpoint: a snapped (or baked) model.
        deployment: deploy.json of the FP16 check, whose remedy is applied here too.
        texts: token ids of held-out texts; the first that is long enough is compared on.

    Raises:
        MismatchError: the checkpoint still has master weights.
        InputError: a model that a format cannot hold, or no text long enough.
        CorruptError: the check's file does not hold what it should.
    """
    model, _ = load_checkpoint(checkpoint)
    if has_masters(model):
        raise MismatchError(f"{checkpoint} has master weights; export what stage snap made of it")
    alpha, norm = _read_deployment(deployment)
    ids = _text(texts, params.prefill_tokens + SINGLE_STEPS)
    expected = model_logits(model, ids)
    report = ExportReport(
        target=params.target, alpha=alpha, norm_checked=norm, fp16_megabytes=_dense_megabytes(model)
    )
    with atomic_folder(out) as folder:
        if "anemll" in params.formats:
            report.anemll = save_anemll(model, folder / "anemll", model_id=params.model_id)
        if "huggingface" in params.formats:
            save_huggingface(model, checkpoint, folder / "huggingface")
            found = model_logits(load_causal_lm(folder / "huggingface"), ids)
            report.logits["huggingface"] = compare(
                found, expected, max_kl=params.max_kl, name="Hugging Face folder"
            )
        if {"coreml", "coreai"} & set(params.formats):
            if alpha != 1:  # after the others: their configs cannot say it
                scale_residual(model, alpha)
            decoder = DeployedDecoder(model, params.context)
            if "coreml" in params.formats:
                _export_coreml(model, decoder, ids, expected, folder / "coreml", params, report)
            if "coreai" in params.formats:
                _export_coreai(decoder, ids, expected, folder / "coreai", params, report)
        for name in params.formats:
            report.folders[name] = folder_megabytes(folder / name)
    return report


def _read_deployment(file: Path) -> tuple[float, str]:
    """alpha, and the form of the norms that were judged."""
    values = read_json(file)
    try:
        return float(values["alpha"]), str(values["norm"])
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{file} does not say alpha and norm; rerun ane_check") from None


def _text(texts: list[list[int]], wanted: int) -> list[int]:
    found = next((text[:wanted] for text in texts if len(text) >= wanted), None)
    if found is None:
        raise InputError(
            f"no validation text has the {wanted} tokens that the comparison needs; lower "
            "export.prefill_tokens or raise tokens.max_length"
        )
    return found


def _dense_megabytes(model: PreTrainedModel) -> float:
    """10^6 bytes of the model with every weight in FP16."""
    return 2 * model_size(model).weights / 1e6


def _export_coreml(
    model: PreTrainedModel,
    decoder: DeployedDecoder,
    ids: list[int],
    expected: Tensor,
    place: Path,
    params: Export,
    report: ExportReport,
) -> None:
    place.mkdir()
    tokens = params.prefill_tokens
    save_package(decoder, place / PACKAGE, tokens=tokens, target=params.target)
    package = Package(place / PACKAGE)
    report.audit = audit_package(package, decoder)
    report.logits["coreml"] = check_package(
        package, decoder, model, expected, ids, tokens=tokens, max_kl=params.max_kl
    )
    # What a Mac compares its predictions with. One key: safetensors keeps no order of several.
    settings = {"tokens": tokens, "slots": params.context}
    save_file(
        {"ids": torch.tensor(ids, dtype=torch.int32), "logits": expected.half().contiguous()},
        place / EXPECTED,
        metadata={SETTINGS: json.dumps(settings)},
    )


def _export_coreai(
    decoder: DeployedDecoder,
    ids: list[int],
    expected: Tensor,
    place: Path,
    params: Export,
    report: ExportReport,
) -> None:
    place.mkdir()
    tokens = params.prefill_tokens
    save_coreai(decoder, place / AIMODEL, tokens=tokens)
    cache = decoder.cache_inputs()
    rows = []
    for start, count in calls(len(ids), tokens):
        inputs = step_inputs(ids[start : start + count], start, count, decoder.slots).named()
        function = "prefill" if count == tokens else "decode"
        results = run_coreai(place / AIMODEL, {**inputs, **cache}, function)
        cache = cache_of(results)
        rows.append(join_logits(results))
    report.logits["coreai"] = compare(
        torch.cat(rows), expected, max_kl=params.max_kl, name="Core AI"
    )
