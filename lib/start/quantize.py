"""Stage quant, from folder to folder: the teacher quantized, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.base.device import resolve_device, set_threads
from lib.base.files import write_json
from lib.model.checkpoint import save_checkpoint
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.model.moments import open_moments
from lib.model.size import model_size
from lib.model.surgery import quantize_model, quantized_layers
from lib.params.data import Run
from lib.quant.spec import ModelSpec


def quant_stage(
    teacher: Path, moments: Path, out: Path, *, spec: ModelSpec, run: Run, declared: str
) -> dict[str, Any]:
    """Write ``out/model``, which every training starts from, and ``out/metrics.json``.

    Args:
        moments: file of the stage `calibrate`; not opened where ``spec`` needs none.
        declared: fingerprint of the params that define the run.

    Raises:
        MismatchError, CorruptError: the moments are another teacher's, or damaged.
        InputError, ParamsError: see :func:`lib.model.surgery.quantize_model`.
    """
    set_threads(run.threads)
    mark = folder_fingerprint(teacher)
    used = open_moments(moments, teacher=mark, spec=spec)
    model = load_causal_lm(teacher)
    model.to(resolve_device(run.device))  # type: ignore[arg-type]
    quantize_model(model, spec, used)
    size = model_size(model)
    metrics = {
        "layers": len(quantized_layers(model)),
        "bits_per_weight": size.bits_per_weight,
        "bits_per_quantized_weight": size.bits_per_layer_weight,
        "calibration_sequences": used.info["sequences"] if used else 0,
    }
    info = {
        "stage": "quant",
        "teacher": mark,
        "parent": mark,
        "moments": used.info["fingerprint"] if used else None,
        "params": declared,
        "result": metrics,
    }
    save_checkpoint(model.cpu(), out / "model", tokenizer_from=teacher, info=info)
    write_json(out / "metrics.json", {"quant": metrics})
    return metrics
