"""A small finished project to damage, and the ways to damage it, for tests of bad input."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib.base.errors import LutqatError
from lib.model.checkpoint import load_checkpoint, save_checkpoint
from lib.model.surgery import quantized_layers
from lib.model.teacher import bring_teacher
from lib.model.tiny import byte_tokenizer
from lib.params.load import PARAMS_FILE, read_yaml
from lib.params.profile import apply_profile
from lib.snap.run import snap_stage

ROOT = Path(__file__).parents[1]
MOMENTS = "runs/calibrate/moments.safetensors"
SCORES = "runs/sensitivity/scores.json"
ARGUMENTS = {
    "teacher": "data/teacher",
    "tokens": "data/teacher data/tokens",
    "cache": "data/teacher data/tokens data/cache",
    "calibrate": "data/teacher data/tokens runs/calibrate",
    "quant": f"data/teacher {MOMENTS} runs/quant",
    "sensitivity": "data/teacher runs/quant/model data/cache runs/sensitivity",
    "scales": f"runs/quant/model data/cache data/teacher data/tokens {SCORES} runs/scales",
    "weights": f"runs/scales/model data/cache data/teacher data/tokens {SCORES} runs/weights",
    "convert": f"runs/scales/model data/teacher data/cache {MOMENTS} runs/convert",
    "snap": "runs/scales/model runs/snap",
    "recover": "runs/snap/model data/teacher data/cache data/tokens runs/recover",
    "ane_check": "runs/snap/model data/tokens runs/ane_check",
    "export": "runs/snap/model data/tokens runs/ane_check/deploy.json runs/export",
    "evaluate": "data/teacher data/tokens runs runs/evaluate",
}
"""Command lines as in dvc.yaml, but with the stages between scales and snap left out."""
BEFORE_TRAINING = ("teacher", "tokens", "calibrate", "quant", "cache")


@dataclass(frozen=True)
class Case:
    """One bad input: what is done to the project, what is run, and what must be said."""

    damage: Callable[[], None]
    command: str
    """A stage of ARGUMENTS, or `lutqat` with its arguments."""
    error: type[LutqatError]
    words: str
    """All that the line must hold, separated by ` | `."""


def run_stage(stage: str) -> None:
    """Run a stage of the project in the working directory as `python -m stages.<stage>` does.

    Raises:
        SystemExit: the stage ended with an error.
    """
    before = sys.argv
    sys.argv = [stage, *ARGUMENTS[stage].split()]
    try:
        runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")
    finally:
        sys.argv = before


def make_project(folder: Path) -> None:
    """The tiny project: teacher, text, tokens, cache, a trained and a snapped checkpoint."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "tests" / "data", folder / "tests" / "data")
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    apply_profile("tiny", folder / "params.yaml", ROOT / "profiles")


def contents() -> dict[str, str]:
    """Every file here but scratch and locks, with its digest."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path().rglob("*")
        if path.is_file() and path.parts[0] != ".ckpt"
    }


# --- damages: functions without arguments, made from what shall be different -------------------


def nothing() -> None:
    """Leave the project as it is."""


def params(**changes: Any) -> Callable[[], None]:
    """Set keys of params.yaml; a double underscore stands for the dot."""

    def damage() -> None:
        values = read_yaml(PARAMS_FILE)
        for key, value in changes.items():
            *path, last = key.split("__")
            node = values
            for part in path:
                node = node[part]
            node[last] = value
        PARAMS_FILE.write_text(json.dumps(values), encoding="utf-8")

    return damage


def text(content: str, **source: Any) -> Callable[[], None]:
    """Make one file with this content the only source of text."""

    def damage() -> None:
        Path(source["source"].removeprefix("path:")).write_text(content, encoding="utf-8")
        params(tokens__train=[source])()

    return damage


def replace(name: str, content: bytes) -> Callable[[], None]:
    """Write a file anew."""

    def damage() -> None:
        Path(name).write_bytes(content)

    return damage


def copy(name: str, target: str) -> Callable[[], None]:
    """Write one file over another."""

    def damage() -> None:
        shutil.copyfile(name, target)

    return damage


def delete(name: str) -> Callable[[], None]:
    """Delete a file or folder."""

    def damage() -> None:
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def truncate(name: str) -> Callable[[], None]:
    """Cut a file's second half off."""

    def damage() -> None:
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) // 2])

    return damage


def flip(name: str) -> Callable[[], None]:
    """Change one byte in a file's middle."""

    def damage() -> None:
        content = bytearray(Path(name).read_bytes())
        content[len(content) // 2] ^= 1
        Path(name).write_bytes(content)

    return damage


def edit(name: str, old: str, new: str) -> Callable[[], None]:
    """Replace some text, which must be there."""

    def damage() -> None:
        content = Path(name).read_text(encoding="utf-8")
        assert old in content
        Path(name).write_text(content.replace(old, new), encoding="utf-8")

    return damage


def both(*damages: Callable[[], None]) -> Callable[[], None]:
    """One after the other."""

    def damage() -> None:
        for one in damages:
            one()

    return damage


def other_teacher() -> None:
    """The same architecture with other weights."""
    bring_teacher("random:llama", None, 1, Path("data/teacher"))


def other_start() -> None:
    """Another teacher, quantized."""
    other_teacher()
    for stage in ("calibrate", "quant"):
        run_stage(stage)


def smaller_vocabulary() -> None:
    """A teacher of 80 tokens where the tokenizer has 259."""
    save_foreign(LlamaForCausalLM(_llama(vocab_size=80)), Path("data/teacher"))


def gpt2() -> None:
    """A model with fused projections."""
    config = GPT2Config(vocab_size=288, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    save_foreign(GPT2LMHeadModel(config), Path("foreign"))
    params(teacher__source="path:foreign")()


def small_llama() -> None:
    """A llama whose tokenizer knows more tokens than it."""
    save_foreign(LlamaForCausalLM(_llama(vocab_size=80)), Path("foreign"))
    params(teacher__source="path:foreign")()


def _llama(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def save_foreign(model: Any, folder: Path) -> None:
    """Write a Hugging Face folder with our byte tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def nan_teacher() -> None:
    """A teacher with one weight that is no number."""
    path = Path("data/teacher/model.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def nan_checkpoint() -> None:
    """A checkpoint, intact as a file, with one weight that is no number."""
    folder = Path("runs/scales/model")
    model, info = load_checkpoint(folder)
    layer = quantized_layers(model)["model.layers.1.mlp.up_proj"]
    layer.scale.a.data[0, 0] = torch.nan
    shutil.copytree(folder, "before")
    save_checkpoint(model, folder, tokenizer_from=Path("before"), info=info)


def baked_instead() -> None:
    """A checkpoint of plain linear layers where a training checkpoint should be."""
    snap_stage(Path("runs/scales/model"), Path("runs/baked"), baked=True)
    shutil.rmtree("runs/scales/model")
    shutil.move("runs/baked/model", "runs/scales/model")


def snapped_instead() -> None:
    """A snapped checkpoint where a training checkpoint should be."""
    shutil.rmtree("runs/scales/model")
    shutil.copytree("runs/snap/model", "runs/scales/model")


def teacher_instead() -> None:
    """A Hugging Face folder where a checkpoint should be."""
    shutil.rmtree("runs/scales/model")
    shutil.copytree("data/teacher", "runs/scales/model")
