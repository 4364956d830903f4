"""Stage teacher: bring the teacher model to disk.

    python -m stages.teacher data/teacher

Writes a Hugging Face folder: fp32 safetensors, config, tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from lib.base.device import set_threads
from lib.base.files import write_json
from lib.base.stage import run_stage
from lib.model.load import folder_fingerprint
from lib.model.teacher import bring_teacher
from lib.params.load import stage_params


def main(out: Path) -> None:
    """Write the folder ``out`` and a metrics.json in it."""
    params = stage_params("teacher")
    set_threads(params.run.threads)
    wanted = params.teacher
    model = bring_teacher(wanted.source, wanted.revision, wanted.seed, out)
    config = model.config.get_text_config()
    metrics = {
        "source": wanted.source,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "fingerprint": folder_fingerprint(out),
    }
    write_json(out / "metrics.json", {"teacher": metrics})
    print(f"{out}: {metrics['architecture']}, {metrics['parameters']:,} parameters")


if __name__ == "__main__":
    run_stage(main)
