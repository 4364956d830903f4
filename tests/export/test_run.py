"""The export from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lib.base.errors import InputError, MismatchError
from lib.export.run import EXPECTED, export_model
from lib.model.checkpoint import save_checkpoint
from lib.params.export import Export
from tests.export.models import IDS, SLOTS, TOKENS, snapped
from tests.tiny_models import quantized

TEXTS = [[1, 2, 3], IDS]


def _params(**changes: Any) -> Export:
    values = {"context": SLOTS, "prefill_tokens": TOKENS, "formats": ("coreml",), **changes}
    return Export(**values)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_checkpoint(snapped(), tmp_path / "model", tokenizer_from=tmp_path, info={}, half=True)
    (tmp_path / "report.json").write_text(json.dumps({"alpha": 1.0}))
    return tmp_path


def _export(source: Path, texts: list[list[int]] = TEXTS, **changes: Any) -> Any:
    out = source / "packages"
    return export_model(source / "model", source / "report.json", texts, out, _params(**changes))


def test_every_format_is_written_and_checked(source: Path) -> None:
    report = _export(source, formats=("coreml", "anemll"))
    assert report.faults == []
    assert report.audit.layers == 14 and report.logits.top1 == 1.0
    assert set(report.folders) == {"coreml", "anemll"}
    assert {p.name for p in (source / "packages").iterdir()} == {"coreml", "anemll"}
    with safe_open(source / "packages" / "coreml" / EXPECTED, "pt") as file:
        assert file.metadata() == {"tokens": str(TOKENS), "slots": str(SLOTS)}
        assert file.get_tensor("ids").tolist() == IDS
        assert file.get_tensor("logits").dtype == torch.float16


def test_the_remedy_of_the_check_is_applied(source: Path) -> None:
    (source / "report.json").write_text(json.dumps({"alpha": 0.25}))
    report = _export(source)
    assert report.alpha == 0.25 and report.faults == []


def test_a_text_that_is_too_short_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="no validation text has the 11 tokens"):
        _export(source, texts=[IDS[:10]])
    assert not (source / "packages").exists()


def test_a_checkpoint_with_masters_is_refused(source: Path) -> None:
    save_checkpoint(quantized("qwen3"), source / "model", tokenizer_from=source, info={})
    with pytest.raises(MismatchError, match="has master weights"):
        _export(source)
