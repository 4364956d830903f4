"""evaluate: the ladder over the teacher and every stage.

Usage: python -m stages.evaluate TEACHER TOKENS RUNS OUT
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lib.base.device import resolve_device, set_threads
from lib.base.stage import run_stage
from lib.evaluate.ladder import HeldOut, Rung, measure_ladder
from lib.evaluate.report import write_ladder
from lib.model.adapter_files import has_adapter
from lib.model.checkpoint import load_checkpoint
from lib.model.load import load_causal_lm, load_tokenizer
from lib.params.load import stage_params
from lib.text.sequences import TokenSet, read_stream

STAGES = ("quant", "scales", "weights", "finetune", "convert", "finetune_q2", "snap")


def main(teacher: Path, tokens: Path, runs: Path, out: Path) -> None:
    """Measure every rung on the test split and write the ladder."""
    params = stage_params("evaluate")
    set_threads(params.run.threads)
    device = resolve_device(params.run.device)
    rungs = [Rung(name="teacher", load=partial(load_causal_lm, teacher), folder=teacher)]
    for stage in STAGES:
        folder = runs / stage / "model"
        rungs.append(Rung(name=stage, load=lambda f=folder: load_checkpoint(f)[0], folder=folder))
    adapter = runs / "recover" / "adapter"
    if has_adapter(adapter):
        from lib.model.adapter import load_adapted  # only now: most runs have none

        rungs.append(Rung(name="+ adapter", load=partial(load_adapted, folder, adapter)))
    test = TokenSet(tokens / "test")
    stream = read_stream(tokens / "test")
    text = HeldOut(stream=stream, input_ids=test.input_ids, lengths=test.lengths)
    ladder = measure_ladder(rungs, text, load_tokenizer(teacher), params.evaluate, device)
    write_ladder(ladder, out, q4="finetune", q2="snap")


if __name__ == "__main__":
    run_stage(main)
