"""Export from folder to folder: every format that was asked for, then the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.errors import InputError, MismatchError
from lib.base.files import atomic_folder, read_json
from lib.export.anemll import save_anemll
from lib.export.audit import audit_package
from lib.export.coreai import run_coreai, save_coreai
from lib.export.coreml import save_package
from lib.export.gate import check_logits, graph_logits, model_logits
from lib.export.graph import DeployedDecoder, step_inputs
from lib.export.huggingface import save_huggingface
from lib.export.package import Package
from lib.export.report import ExportReport
from lib.model.checkpoint import load_checkpoint
from lib.model.rescale import scale_residual
from lib.model.size import folder_megabytes, model_size
from lib.model.surgery import has_masters
from lib.params.export import Export

PACKAGE = "model.mlpackage"
EXPECTED = "check.safetensors"
SINGLE_STEPS = 3  # tokens after the prefill, one by one, in the comparison
GRAPH_FORMATS = ("coreml", "coreai")


def export_model(
    checkpoint: Path, report_file: Path, texts: list[list[int]], out: Path, params: Export
) -> ExportReport:
    """Write ``out/FORMAT`` for every format, replacing ``out`` whole, and check them.

    Args:
        checkpoint: a snapped (or baked) model.
        report_file: report.json of the FP16 check, whose remedy is applied here too.
        texts: token ids of held-out texts; the first that is long enough is compared on.

    Raises:
        MismatchError: the checkpoint still has master weights.
        InputError: a model that a format cannot hold, or no text long enough.
    """
    model, _ = load_checkpoint(checkpoint)
    if has_masters(model):
        raise MismatchError(f"{checkpoint} has master weights; export what stage snap made of it")
    alpha = float(read_json(report_file)["alpha"])
    weights = sum(p.numel() for p in model.parameters())
    size = model_size(model)
    report = ExportReport(
        target=params.target, alpha=alpha, fp16_megabytes=2 * max(weights, size.weights) / 1e6
    )
    with atomic_folder(out) as folder:
        if "anemll" in params.formats:
            save_anemll(model, folder / "anemll", model_id=params.model_id)
        if "huggingface" in params.formats:
            save_huggingface(model, checkpoint, folder / "huggingface")
        if set(GRAPH_FORMATS) & set(params.formats):
            if alpha != 1:  # after the others: their configs cannot say it
                scale_residual(model, alpha)
            _export_graph(model, texts, folder, params, report)
        for name in params.formats:
            report.folders[name] = folder_megabytes(folder / name)
    return report


def _export_graph(
    model: PreTrainedModel,
    texts: list[list[int]],
    folder: Path,
    params: Export,
    report: ExportReport,
) -> None:
    """The formats made from the static graph."""
    tokens = params.prefill_tokens
    wanted = tokens + SINGLE_STEPS
    ids = next((text[:wanted] for text in texts if len(text) >= wanted), None)
    if ids is None:
        raise InputError(
            f"no validation text has the {wanted} tokens that the comparison needs; lower "
            "export.prefill_tokens or raise tokens.max_length"
        )
    expected = model_logits(model, ids)
    decoder = DeployedDecoder(model, params.context)
    if "coreml" in params.formats:
        place = folder / "coreml"
        place.mkdir()
        save_package(decoder, place / PACKAGE, tokens=tokens, target=params.target)
        package = Package(place / PACKAGE)
        report.audit = audit_package(package, decoder)
        report.logits = check_logits(
            package, decoder, expected, ids, tokens=tokens, max_kl=params.max_kl
        )
        _save_expected(place / EXPECTED, ids, expected, params)
    if "coreai" in params.formats:
        place = folder / "coreai"
        place.mkdir()
        save_coreai(decoder, place / "model.aimodel", tokens=tokens)
        report.coreai = _check_coreai(decoder, place / "model.aimodel", ids[:tokens])


def _save_expected(file: Path, ids: list[int], logits: Tensor, params: Export) -> None:
    """What a Mac compares its predictions with."""
    tensors = {"ids": torch.tensor(ids, dtype=torch.int32), "logits": logits.half().contiguous()}
    metadata = {"tokens": str(params.prefill_tokens), "slots": str(params.context)}
    save_file(tensors, file, metadata=metadata)


def _check_coreai(decoder: DeployedDecoder, package: Path, ids: list[int]) -> dict[str, Any]:
    """The package executed by Core AI's CPU runtime, against the graph in float32."""
    keys, values = decoder.empty_cache()
    inputs = step_inputs(ids, 0, len(ids), decoder.slots).named()
    results = run_coreai(package, {**inputs, "keys": keys, "values": values})
    parts = [results[f"logits_{number}"].float() for number in range(len(decoder.head))]
    found = torch.cat(parts, dim=1)[0, :, 0].T
    expected = graph_logits(decoder, ids, len(ids))
    same = float((found.argmax(1) == expected.argmax(1)).float().mean())
    return {
        "tokens": len(ids),
        "largest_difference": float((found - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "top1": same,
        "faults": [] if same >= 0.95 else [f"Core AI: top-1 agreement {same:.3f} is below 0.95"],
    }
