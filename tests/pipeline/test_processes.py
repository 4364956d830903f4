"""Stages in two processes on the CPU: the result of one, up to summation order."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lib.base.errors import ParamsError
from lib.base.workers import WorkerError
from lib.params.profile import apply_profile
from tests.pipeline.project import ROOT

STEPS = 12


def write_params(folder: Path, processes: int, *, shard: bool = False) -> None:
    path = folder / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    apply_profile("tiny", path)
    values = yaml.safe_load(path.read_text())
    values["scales"].update(steps=STEPS, eval_every=4, checkpoint_every=2)
    values["recover"].update(steps=4, dropout=0.0)  # masks of one and of several differ
    values["run"].update(device="cpu", log_every=1, processes=processes, shard=shard)
    path.write_text(yaml.safe_dump(values))


def start(folder: Path, stage: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a stage as DVC would."""
    hidden = ("RANK", "WORLD_SIZE", "DVC_ROOT")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, stage: str, *arguments: str) -> str:
    process = start(folder, stage, *arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, tokens, the untrained model, and the caches that one process and two make."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (folder / "tests").symlink_to(ROOT / "tests")
    write_params(folder, 1)
    run(folder, "teacher", "teacher")
    run(folder, "tokens", "teacher", "tokens")
    run(folder, "calibrate", "teacher", "tokens", "calibrate")
    run(folder, "quant", "teacher", "calibrate/moments.safetensors", "quant")
    run(folder, "cache", "teacher", "tokens", "cache")
    write_params(folder, 2)
    run(folder, "cache", "teacher", "tokens", "cache2")
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows_of(folder) if row[name]]


@pytest.fixture(scope="module")
def both(workspace: Path) -> Path:
    """The workspace with stage scales run by two processes, without interruption: whole copies
    in ``two``, parts of the model in ``sharded``."""
    for shard, out in ((False, "two"), (True, "sharded")):
        write_params(workspace, 2, shard=shard)
        output = run(workspace, "scales", "quant/model", "cache", "teacher", "no text", "none", out)
        assert output.count(f"scales {STEPS}/{STEPS}") == 1  # one of them talks
    return workspace


def test_the_cache_is_the_same_bytes(workspace: Path) -> None:
    files = sorted(p.relative_to(workspace / "cache") for p in (workspace / "cache").rglob("*.*"))
    assert len(files) > 4
    for file in files:
        assert (workspace / "cache" / file).read_bytes() == (
            workspace / "cache2" / file
        ).read_bytes()


def test_the_loss_curve_is_that_of_one_process(both: Path) -> None:
    write_params(both, 1)
    run(both, "scales", "quant/model", "cache", "teacher", "no text", "none", "one")
    for name, tolerance in (("loss", 1e-4), ("val_kd_loss", 1e-4), ("gradient_norm", 1e-3)):
        one = column(both / "one", name)
        assert len(one) >= 4
        for several in ("two", "sharded"):
            assert column(both / several, name) == pytest.approx(one, rel=tolerance), (
                several,
                name,
            )
    assert column(both / "two", "val_kd_loss")[-1] < 0.9 * column(both / "two", "val_kd_loss")[0]


def _second_worker(launcher: int) -> int | None:
    """Process id of rank 1 among the children of the launcher (Linux)."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and b"RANK=1" in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (ProcessLookupError, PermissionError, FileNotFoundError):
            continue
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker in /proc")
@pytest.mark.parametrize(("shard", "whole"), [(False, "two"), (True, "sharded")])
def test_a_killed_process_stops_the_run_and_it_resumes_bit_for_bit(
    both: Path, shard: bool, whole: str
) -> None:
    write_params(both, 2, shard=shard)
    process = start(both, "scales", "quant/model", "cache", "teacher", "no text", "none", "again")
    deadline = time.monotonic() + 120
    while not list((both / ".ckpt" / "scales").glob("*/state/state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    worker = _second_worker(process.pid)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == WorkerError.exit_code
    assert "error: scales: process 1 of 2 was killed by SIGKILL; the others were stopped" in output
    output = run(both, "scales", "quant/model", "cache", "teacher", "no text", "none", "again")
    assert output.count("going on after step") == 1
    assert rows_of(both / "again") == rows_of(both / whole)
    weights = [both / name / "model" / "model.safetensors" for name in ("again", whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_error_of_all_is_said_once(both: Path) -> None:
    write_params(both, 2)
    process = start(
        both, "scales", "quant/model", "nothing", "teacher", "no text", "none", "failed"
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 3
    assert output.count("error:") == 1 and "nothing" in output


def test_more_processes_than_sequences(both: Path) -> None:
    write_params(both, 2)
    path = both / "params.yaml"
    path.write_text(path.read_text().replace("batch_size: 8", "batch_size: 1"))
    process = start(both, "scales", "quant/model", "cache", "teacher", "no text", "none", "failed")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == ParamsError.exit_code
    assert "2 processes cannot share a batch of 1 sequences" in output


def test_adapters_train_in_several_processes_too(both: Path) -> None:
    run(both, "snap", "two/model", "snapped")
    folders = ("snapped/model", "teacher", "cache", "tokens")
    for name, processes, shard in (("a1", 1, False), ("a2", 2, False), ("a3", 2, True)):
        write_params(both, processes, shard=shard)
        run(both, "recover", *folders, name)
    for name in ("loss", "val_kd_loss"):
        one = column(both / "a1", name)
        assert len(one) >= 4 and one[-1] != one[0]
        for several in ("a2", "a3"):
            assert column(both / several, name) == pytest.approx(one, rel=1e-4), (several, name)
