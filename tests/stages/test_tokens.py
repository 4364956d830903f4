"""The stages teacher and tokens as DVC runs them: on disk, from params.yaml."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import stages.teacher
import stages.tokens
from lib.base.errors import LutqatError
from lib.capture import own_text
from lib.model.load import folder_fingerprint, load_causal_lm, tokenizer_fingerprint
from lib.params.load import read_yaml
from lib.text.sequences import TokenSet, read_stream

ROOT = Path(__file__).parents[2]
TOKENS: dict[str, Any] = {
    "train": [
        {"source": "path:data/local/prose.txt"},
        {"source": "path:data/local/instructions.json", "format": "alpaca_chat"},
    ],
    "max_length": 32,
    "val_fraction": 0.2,
    "test_fraction": 0.2,
    "val_sequences": 8,
    "test_sequences": 8,
}


def write_params(tokens: dict[str, Any]) -> None:
    teacher = {"source": "random:qwen3"}
    sections = {**read_yaml(ROOT / "params.yaml"), "teacher": teacher, "tokens": tokens}
    Path("params.yaml").write_text(json.dumps(sections))


@pytest.fixture
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    shutil.copytree(ROOT / "tests" / "data", Path("data", "local"))
    write_params(TOKENS)


@pytest.mark.usefixtures("_workspace")
def test_from_params_to_tokens() -> None:
    teacher, out = Path("data/teacher"), Path("data/tokens")
    stages.teacher.main(teacher)
    stages.tokens.main(teacher, out)
    model = load_causal_lm(teacher)
    about = json.loads((teacher / "metrics.json").read_text())["teacher"]
    assert about["parameters"] == model.num_parameters()
    assert about["fingerprint"] == folder_fingerprint(teacher)
    metrics = json.loads((out / "metrics.json").read_text())["tokens"]
    for split in ("train", "val", "test"):
        tokens = TokenSet(out / split)
        assert tokens.meta["split"] == split
        assert tokens.meta["tokenizer"] == tokenizer_fingerprint(teacher)
        assert metrics[f"{split}_sequences"] == len(tokens)
        assert metrics[f"{split}_tokens"] == tokens.lengths.sum()
    assert metrics["val_sequences"] == metrics["test_sequences"] == 8
    assert metrics["train_sequences"] > 100
    assert metrics["stream_tokens"] == len(read_stream(out / "test")) > 500
    assert len(metrics["licences"]) == 2


@pytest.mark.usefixtures("_workspace")
def test_a_failure_leaves_the_old_tokens() -> None:
    teacher, out = Path("data/teacher"), Path("data/tokens")
    stages.teacher.main(teacher)
    stages.tokens.main(teacher, out)
    before = TokenSet(out / "train").meta["fingerprint"]
    write_params({**TOKENS, "train": [{"source": "path:data/local/absent.txt"}]})
    with pytest.raises(LutqatError, match=r"absent\.txt"):
        stages.tokens.main(teacher, out)
    assert TokenSet(out / "train").meta["fingerprint"] == before


@pytest.mark.usefixtures("_workspace")
def test_text_by_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies goes on with its finished batches, and ends as one that never stopped."""
    teacher = Path("data/teacher")
    stages.teacher.main(teacher)
    own = {"source": "self", "sequences": 24}
    write_params({**TOKENS, "train": [*TOKENS["train"], own]})
    written: list[bool] = []
    plain = own_text.write_rows

    def writing(dies: bool) -> None:
        def write(*arguments: Any) -> Any:
            written.append(True)
            if dies and len(written) == 2:
                raise KeyboardInterrupt
            return plain(*arguments)

        written.clear()
        monkeypatch.setattr(own_text, "write_rows", write)

    writing(dies=True)
    with pytest.raises(KeyboardInterrupt):
        stages.tokens.main(teacher, Path("resumed"))
    writing(dies=False)
    stages.tokens.main(teacher, Path("resumed"))
    resumed = len(written)
    writing(dies=False)
    stages.tokens.main(teacher, Path("whole"))
    assert resumed == len(written) - 1
    assert not list(Path(".ckpt/tokens").glob("*/*"))
    for split in ("train", "val", "test"):
        one, other = (TokenSet(Path(out) / split) for out in ("resumed", "whole"))
        assert one.meta["fingerprint"] == other.meta["fingerprint"]
    metrics = json.loads(Path("whole/metrics.json").read_text())["tokens"]
    assert "self: written by the teacher" in metrics["licences"][-1]


@pytest.mark.usefixtures("_workspace")
def test_the_model_is_loaded_for_its_own_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Path("data/teacher")
    stages.teacher.main(teacher)
    (teacher / "model.safetensors").unlink()
    stages.tokens.main(teacher, Path("data/tokens"))
    write_params({**TOKENS, "train": [{"source": "self", "sequences": 4}]})
    with pytest.raises(LutqatError, match=r"safetensors"):
        stages.tokens.main(teacher, Path("data/tokens"))
