"""cache info and cache verify."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.cache.shards import CacheReader
from lib.capture.build import cache_statistics
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
