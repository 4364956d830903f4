"""The export from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.export.names import EXPECTED, PACKAGE, SETTINGS
from lib.export.package import Package
from lib.export.run import export_model
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
    (tmp_path / "deploy.json").write_text(json.dumps({"alpha": 1.0, "norm": "prescaled"}))
    return tmp_path


def _export(source: Path, texts: list[list[int]] = TEXTS, **changes: Any) -> Any:
    out = source / "packages"
    return export_model(source / "model", source / "deploy.json", texts, out, _params(**changes))


def test_every_format_is_written_and_checked(source: Path) -> None:
    report = _export(source, formats=("coreml", "anemll"))
    assert report.faults == []
    assert report.audit.layers == 14 and report.logits["coreml"].top1 == 1.0
    assert set(report.folders) == {"coreml", "anemll"}
    assert {p.name for p in (source / "packages").iterdir()} == {"coreml", "anemll"}
    with safe_open(source / "packages" / "coreml" / EXPECTED, "pt") as file:
        assert file.metadata() == {SETTINGS: json.dumps({"tokens": TOKENS, "slots": SLOTS})}
        assert file.get_tensor("ids").tolist() == IDS
        assert file.get_tensor("logits").dtype == torch.float16


def _constants(source: Path) -> set[bytes]:
    operations = Package(source / "packages" / "coreml" / PACKAGE).function("decode").operations
    values = (o.attributes.get("val") for o in operations)
    return {value.tobytes() for value in values if isinstance(value, np.ndarray)}


def test_the_remedy_of_the_check_is_applied(source: Path) -> None:
    table = snapped().get_input_embeddings().weight.detach().numpy()
    before, after = (((alpha * table).astype(np.float16)).tobytes() for alpha in (1, 0.25))
    _export(source)
    assert before in _constants(source) and after not in _constants(source)
    (source / "deploy.json").write_text(json.dumps({"alpha": 0.25, "norm": "prescaled"}))
    report = _export(source)
    assert report.alpha == 0.25 and report.faults == []
    assert after in _constants(source) and before not in _constants(source)


@pytest.mark.parametrize("content", ["{}", "[]", '{"alpha": "x", "norm": "plain"}'])
def test_a_check_of_another_format_is_refused(source: Path, content: str) -> None:
    (source / "deploy.json").write_text(content)
    with pytest.raises(CorruptError, match="does not say alpha and norm; rerun ane_check"):
        _export(source)


def test_a_text_that_is_too_short_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="no validation text has the 11 tokens"):
        _export(source, texts=[IDS[:10]])
    assert not (source / "packages").exists()


def test_a_checkpoint_with_masters_is_refused(source: Path) -> None:
    save_checkpoint(quantized("qwen3"), source / "model", tokenizer_from=source, info={})
    with pytest.raises(MismatchError, match="has master weights"):
        _export(source)
