"""cache info and cache verify."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.api import load_teacher, quantize, train
from lib.cache.shards import CacheReader
from lib.capture.build import cache_statistics
from tests.capture.foreign_shards import make_teacher, write_folder
from tests.cli.run import lutqat
from tests.cli.test_inspect import rows
from tests.tiny_models import make_caches


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``raw`` and ``packed``, each with ``train`` and ``val``."""
    root = tmp_path_factory.mktemp("caches")
    for codec in ("raw", "packed"):
        made = make_caches(root / codec, rows=20, codec=codec)
        for path in made.glob("scratch-*"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    return root


@pytest.mark.parametrize("codec", ["raw", "packed"])
def test_info_of_both_splits(caches: Path, codec: str) -> None:
    outcome = lutqat("cache", "info", caches / codec)
    assert outcome.code == 0, outcome.err
    assert outcome.out.split()[:2] == ["train", "val"]
    found = rows(outcome.out)
    train, val = (CacheReader(caches / codec / split) for split in ("train", "val"))
    figures = [cache_statistics(caches / codec / split) for split in ("train", "val")]
    assert found["rows"] == "20 16"
    assert found["codec"] == f"{codec} {codec}"
    assert found["level_bits"] == ("- -" if codec == "raw" else "6 6")
    assert found["bytes per token"] == " ".join(str(f["bytes_per_token"]) for f in figures)
    assert found["top-k mass"] == " ".join(str(f["topk_mass"]) for f in figures)
    assert found["spec's fingerprint"] == f"{train.spec.fingerprint} {val.spec.fingerprint}"
    assert found["content"] == f"{train.fingerprint} {val.fingerprint}"
    assert found["teacher"] == "tiny tiny"


def test_info_of_one_split(caches: Path) -> None:
    outcome = lutqat("cache", "info", caches / "packed" / "val")
    assert outcome.code == 0 and rows(outcome.out)["split"] == "val"


def test_info_of_sampled_targets(tmp_path: Path) -> None:
    made = make_caches(tmp_path, rows=20, targets="sampled", samples=9)
    found = rows(lutqat("cache", "info", made / "train").out)
    figures = cache_statistics(made / "train")
    assert (found["targets"], found["samples"], found["sample_temperature"]) == (
        "sampled",
        "9",
        "2.0",
    )
    assert found["mass of the samples"] == str(figures["sampled_mass"])
    assert found["top-k mass"] == found["top_k"] == found["negatives"] == "-"
    both = lutqat("cache", "info", tmp_path)
    assert both.code == 0, both.err
    assert rows(both.out)["targets"] == "sampled topk"
    assert rows(both.out)["samples"] == "9 -" and rows(both.out)["top_k"] == "- 8"
    assert lutqat("cache", "verify", tmp_path).out.strip().endswith("is whole: 36 rows")


@pytest.mark.parametrize("codec", ["raw", "packed"])
def test_verify(caches: Path, codec: str, tmp_path: Path) -> None:
    outcome = lutqat("cache", "verify", caches / codec)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().endswith("is whole: 36 rows")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for file in (caches / codec / split).iterdir():
            (tmp_path / split / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    lutqat("cache", "verify", tmp_path).refused_with(5, "shard-00001.arrow is damaged")
    assert lutqat("cache", "verify", tmp_path / "val").code == 0


def test_bad_folders(tmp_path: Path) -> None:
    for command in ("info", "verify"):
        lutqat("cache", command, tmp_path).refused_with(3, "holds no teacher cache")
        text = " ".join(lutqat("cache", command, "--help").out.split())
        assert f"Example: lutqat cache {command} data/cache" in text


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


def test_import_and_train(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    model, _ = load_teacher(teacher)
    write_folder(tmp_path / "foreign", model, [8, 8])
    outcome = lutqat("cache", "import", "foreign", "out", "--teacher", teacher, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "15 train and 1 val sequences; dropped: 0 duplicates" in outcome.out
    again = lutqat(
        *("cache", "import", "foreign", "out", "--teacher", teacher, "--val-fraction", "0.25"),
        *("--codec", "packed"),
    )
    assert again.code == 0 and "12 train and 4 val" in again.out  # a cache may be replaced
    assert lutqat("cache", "verify", "out").out.strip() == "out is whole: 16 rows"
    student = quantize(model, lut_size=4, rank=2)
    result = train(student, "out", steps=3, batch_size=4, device="cpu", target="tail")
    assert result["best_kd"] < result["initial_kd"]


def test_import_needs_the_teacher_and_a_new_folder(tmp_path: Path, teacher: Path) -> None:
    lutqat("cache", "import", tmp_path, tmp_path / "out").refused_with(
        3, "without their sum over the vocabulary"
    )
    (tmp_path / "file").write_text("")
    lutqat("cache", "import", tmp_path, tmp_path, "--teacher", teacher).refused_with(
        3, "exists and is no cache"
    )
    lutqat("cache", "import", tmp_path, tmp_path / "out", "--teacher", teacher).refused_with(
        3, "no folder with .pt files"
    )
    text = " ".join(lutqat("cache", "import", "--help").out.split())
    assert "Example: lutqat cache import kd_cache imported --teacher data/teacher" in text
