"""The page of one experiment: what it says, what it escapes, what it does without."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lib.base.errors import InputError
from lib.report.experiment import read_experiment
from lib.report.source import workspace
from tests.report.runs import LAYERS, STAGES, Page, page_of, write, write_runs

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{ 7*7 }}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_runs(tmp_path)


LOCK = {
    "stages": {
        "scales": {
            "params": {"params.yaml": {"quant": {"lut_size": 8}}},
            "deps": [{"path": "lib/base", "md5": "0123"}],
            "outs": [{"path": "runs/scales/model", "md5": "89ab", "size": 3}],
        }
    }
}


def replaced(value: Any, rng: random.Random, wrong: Any) -> Any:
    """A copy of JSON ``value`` in which something, chosen at random, is ``wrong``."""
    if not value or not isinstance(value, dict | list) or rng.random() < 0.1:
        return wrong
    key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    copy: Any = value.copy()
    copy[key] = replaced(value[key], rng, wrong)
    return copy


def edit(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")


class TestContent:
    def test_tracked_numbers_appear_with_every_digit(self, root: Path) -> None:
        exact = Page(page_of(root)).exact()
        for value in (1.234567, 34.448, 21.75, 2.84888253, 1.25e-05, 61.5, 123456, 60.25):
            assert json.dumps(value) in exact, value

    def test_every_stage_and_section_is_there(self, root: Path) -> None:
        page = Page(page_of(root))
        ids = {attributes.get("id") for attributes in page.named("section")}
        assert {"ladder", "sizes", "training", "layers", "ane", "export", "samples"} <= ids
        links = {attributes["href"] for attributes in page.named("a")}
        assert {f"#{name}" for name in ids} <= links
        assert all(stage in page.text for stage in STAGES)
        assert "The answer of finetune_q2." in page.text
        assert "MLPs 2 bits, attention 4 bits" in page.text
        assert "f00dfeedf00d" in page.text
        assert "0.00003" in page.text or "3e-05" in page.text

    def test_charts_say_what_they_show(self, root: Path) -> None:
        charts = list(Page(page_of(root)).named("svg"))
        assert len(charts) >= 12
        labels = [chart["aria-label"] for chart in charts]
        assert all(chart["role"] == "img" for chart in charts)
        assert any("snap 34.448" in label or "snap 1.749" in label for label in labels)
        assert any("q_proj of block 0" in label for label in labels)

    def test_a_changed_metric_changes_the_page(self, root: Path, tmp_path: Path) -> None:
        before = page_of(root)
        edit(root / "runs/scales/metrics.json", {"scales": {"best_kd": 1.5625}})
        after = page_of(root)
        assert "1.5625" in Page(after).exact()
        assert "1.5625" not in Page(before).exact()

    def test_same_files_same_bytes(self, root: Path) -> None:
        assert page_of(root) == page_of(root)
        assert str(root) not in page_of(root)
        assert not re.search(r"\b20\d\d-\d\d-\d\d", page_of(root))

    def test_failed_gate_is_told(self, root: Path) -> None:
        from tests.report.runs import ane_report

        assert "FAILED" not in Page(page_of(root)).text
        edit(root / "runs/ane_check/report.json", ane_report(passed=False))
        text = Page(page_of(root)).text
        assert "FP16 check FAILED" in text
        assert f"{LAYERS[0]} (baked, wide): overflows" in text

    def test_parameters_that_changed_since_are_told(self, root: Path) -> None:
        recorded = {"params.yaml": {"quant": {"lut_size": 8}}}
        lock = {"stages": {"scales": {"cmd": "x", "params": recorded, "outs": []}}}
        write(root / "dvc.lock", json.dumps(lock))
        assert "scales ran with other parameters" in Page(page_of(root)).text
        recorded["params.yaml"] = {"quant.lut_size": 16}  # type: ignore[dict-item]
        write(root / "dvc.lock", json.dumps(lock))
        assert "other parameters" not in Page(page_of(root)).text

    def test_tables_have_scopes_and_captions(self, root: Path) -> None:
        page = Page(page_of(root))
        tables = [name for name, _ in page.elements if name == "table"]
        captions = [name for name, _ in page.elements if name == "caption"]
        assert len(tables) == len(captions) > 10
        assert all(cell["scope"] in ("col", "row", "colgroup") for cell in page.named("th"))


class TestEscaping:
    def test_nothing_of_a_file_becomes_markup(self, root: Path) -> None:
        plain = Page(page_of(root))
        samples = {"prompts": [EVIL], "answers": {"teacher": [EVIL], EVIL: [EVIL]}}
        write(root / "runs/evaluate/samples.json", json.dumps(samples))
        write(root / "params.yaml", json.dumps({"quant": {EVIL: EVIL}, EVIL: [EVIL]}))
        edit(root / "runs/ane_check/report.json", {"warnings": [EVIL], "ane": EVIL})
        edit(root / "runs/export/report.json", {"faults": [EVIL], "folders": {EVIL: 1.5}})
        edit(root / "runs/scales/metrics.json", {"scales": {EVIL: EVIL}})
        edit(root / "runs/sensitivity/scores.json", {f"model.layers.0.{EVIL}": 1.0})
        edit(root / "data/teacher/metrics.json", {"teacher": {"source": EVIL, EVIL: EVIL}})
        text = page_of(root)
        page = Page(text)
        tags = {name for name, _ in page.elements}
        assert tags <= {name for name, _ in plain.elements}
        assert "script" not in tags and "img" not in tags
        assert not any(name.startswith("on") for _, found in page.elements for name in found)
        assert page.text.count(EVIL) > 10
        assert "49" not in page.text.replace(EVIL, "").split()

    def test_attributes_hold_their_quotes(self, root: Path) -> None:
        scores = {'model.layers.0.x" onload="alert(1)': 2.0}
        write(root / "runs/sensitivity/scores.json", json.dumps(scores))
        page = Page(page_of(root))
        assert not any("onload" in found for _, found in page.elements)
        assert any('onload="' in found.get("aria-label", "") for found in page.named("svg"))


class TestMissing:
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_stage_that_did_not_run(self, root: Path, stage: str) -> None:
        shutil.rmtree(root / ("data" if stage == "teacher" else "runs") / stage, ignore_errors=True)
        page = Page(page_of(root))
        assert f"No metrics of {stage}" in page.text or f", {stage}" in page.text

    def test_only_metrics(self, root: Path) -> None:
        """As in a fresh clone, without what DVC caches, and without the big reports."""
        for path in [*root.rglob("*.csv"), *root.rglob("report.json"), *root.rglob("ladder.json")]:
            path.unlink()
        page = Page(page_of(root))
        for words in ("left no runs/evaluate/ladder.json", "No training stage left a log.csv"):
            assert words in page.text
        assert "Not run" in page.text
        assert "1.234567" in page.exact()

    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
    @pytest.mark.parametrize("name", ["evaluate/ladder.json", "ane_check/report.json"])
    def test_a_broken_file_is_named(self, root: Path, name: str, content: bytes) -> None:
        (root / "runs" / name).write_bytes(content)
        text = Page(page_of(root)).text
        assert f"runs/{name} cannot be read" in text
        assert "1.234567" in Page(page_of(root)).exact()

    @pytest.mark.parametrize("log", ["step,kd_loss\n1\n", "a,b\n1,2\n", "step,kd_loss\n1,x\n"])
    def test_a_broken_log_is_named(self, root: Path, log: str) -> None:
        write(root / "runs/scales/log.csv", log)
        assert "runs/scales/log.csv cannot be read" in Page(page_of(root)).text

    @pytest.mark.parametrize("name", ["evaluate/ladder", "evaluate/samples", "ane_check/report"])
    @pytest.mark.parametrize("change", [{}, {"rows": 3, "prompts": 3, "headroom": 3}])
    def test_a_file_of_another_form_is_told(
        self, root: Path, name: str, change: dict[str, object]
    ) -> None:
        write(root / f"runs/{name}.json", json.dumps({"x": 1, **change}))
        text = Page(page_of(root)).text
        assert "has not the form that this version writes" in text
        assert "1.234567" in Page(page_of(root)).exact()

    @pytest.mark.parametrize("seed", range(30))
    def test_any_wrong_value_leaves_a_page_or_one_line(self, root: Path, seed: int) -> None:
        """One value of one file becomes something else."""
        rng = random.Random(seed)
        write(root / "dvc.lock", json.dumps(LOCK))
        files = sorted(p for p in root.rglob("*") if p.suffix in (".json", ".yaml", ".lock"))
        path = rng.choice(files)
        wrong = rng.choice([None, "x", [], {}, -1, math.nan, True, 10**400, [1], {"a": None}])
        path.write_text(json.dumps(replaced(json.loads(path.read_text()), rng, wrong)))
        with contextlib.suppress(InputError):  # dvc.yaml without stages
            assert Page(page_of(root)).text.endswith("the same page.")

    def test_losses_that_are_not_finite_are_left_out(self, root: Path) -> None:
        write(root / "runs/scales/log.csv", "step,val_kd_loss\n0,inf\n1,nan\n2,1.5\n")
        page = page_of(root)
        assert not re.search(r"\b(nan|inf)\b", page)
        assert "Held out 1.5 → 1.5." in Page(page).text

    def test_nothing_at_all(self, root: Path) -> None:
        shutil.rmtree(root / "runs")
        shutil.rmtree(root / "data")
        with pytest.raises(InputError, match="no stage has results.*dvc repro"):
            read_experiment(workspace(root))
        (root / "dvc.yaml").unlink()
        with pytest.raises(InputError, match="root of the repository"):
            read_experiment(workspace(root))


def addresses(page: str) -> list[str]:
    """Everything that a browser would load or follow."""
    parsed = Page(page)
    found = [
        value
        for _, attributes in parsed.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href")
    ]
    styled = re.finditer(r"url\(([^)]*)\)|@import\s+(\S+)", page)
    return found + [match[1] or match[2] for match in styled]


def test_the_page_needs_nothing_else(root: Path) -> None:
    page = page_of(root)
    assert set(addresses(page)) == {
        *(f"#{a['id']}" for a in Page(page).named("section")),
        *("#main", "data:,"),
    }
    tags = {name for name, _ in Page(page).elements}
    assert not tags & {"script", "iframe", "object", "embed", "img", "base"}
    assert "http:" not in page and "https:" not in page
    policy = next(m["content"] for m in Page(page).named("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


def test_addresses_are_noticed() -> None:
    page = '<p style="background: url(http://x/y)"></p><a href="https://z"></a>'
    assert len(addresses(page)) == 2
