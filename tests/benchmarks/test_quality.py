"""The quality of whole experiments: seeds, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.quality import BUDGETS, EVALUATED, SEEDED, figures_of, set_run, summary_of
from lib.params.load import load_params
from lib.params.profile import apply_profile

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("budget", BUDGETS)
def test_run_0_is_the_profile_and_others_share_no_seed(tmp_path: Path, budget: str) -> None:
    file = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    apply_profile(BUDGETS[budget].profile, file, ROOT / "profiles")
    given, text = load_params(file), file.read_text()
    set_run(file, 0)
    evaluate = given.evaluate.model_copy(update=EVALUATED)
    assert load_params(file) == given.model_copy(update={"evaluate": evaluate})
    seen: set[int] = set()
    for run in (2, 1, 0):
        set_run(file, run)
        found = load_params(file)
        training = {getattr(found, s).seed for s in SEEDED if s not in ("cache", "convert")}
        assert not seen & training
        seen |= training
        assert found.tokens == given.tokens and found.teacher == given.teacher
    assert file.read_text().count("#") == text.count("#")


def ladder(teacher: float, **models: float) -> dict[str, Any]:
    same = {"kl": 0.1, "top1": 0.9, "bits_per_weight": 6.0, "bits_per_layer_weight": 4.0}
    models = {"teacher": teacher, **models}
    return {"rows": [{"model": m, "perplexity": p, **same} for m, p in models.items()]}


def test_ratios_are_to_the_teacher_of_the_same_run() -> None:
    found = figures_of(ladder(20.0, scales=90.0, finetune=21.0, snap=34.0))
    assert (found["q4_ratio"], found["q2_ratio"]) == (1.05, 1.7)
    assert (found["q4_perplexity"], found["q2_bits_per_layer_weight"]) == (21.0, 4.0)
    with pytest.raises(KeyError, match="snap"):
        figures_of(ladder(20.0, finetune=21.0))


def test_medians_and_spreads() -> None:
    runs = [{"q4_ratio": q4, "q2_ratio": q2} for q4, q2 in ((1.1, 2.0), (1.0, 1.5), (1.3, 1.8))]
    found = summary_of({"short": runs, "long": runs[:1]})
    assert (found["q4_ratio_short"], found["q2_ratio_short"]) == (1.1, 1.8)
    assert found["q4_spread_short"] == pytest.approx(0.3)
    assert found["q2_ratio_long"] == 2.0 and "q2_spread_long" not in found


def test_one_budget_is_measured_and_the_other_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = 0.0

    def repro(folder: Path) -> dict[str, float]:
        seed = load_params(folder / "params.yaml").scales.seed
        out = folder / "runs/evaluate/ladder.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        found = ladder(10.0, finetune=11.0 + seed / 100 + offset, snap=20.0)
        out.write_text(json.dumps(found))
        return {"scales": 2.0, "weights": 3.0}

    def clone(*_: Any, **__: Any) -> None:
        shutil.copytree(ROOT / "profiles", tmp_path / "clone/profiles")
        shutil.copy(ROOT / "params.yaml", tmp_path / "clone")

    monkeypatch.setattr(quality.record, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "time_repro", repro)
    monkeypatch.setattr(quality.subprocess, "run", clone)
    kept = {"samples": {"long": [{"run": 0, "q4_ratio": 1.01, "q2_ratio": 1.5}]}}
    (tmp_path / "quality.json").write_text(json.dumps(kept))
    monkeypatch.setattr("sys.argv", ["quality", "--keep", str(tmp_path / "clone")])
    quality.main()
    written = json.loads((tmp_path / "quality.json").read_text())
    assert [run["run"] for run in written["samples"]["short"]] == [0, 1, 2]
    ratios = [run["q4_ratio"] for run in written["samples"]["short"]]
    assert ratios == pytest.approx([1.1, 1.2, 1.3])
    assert written["samples"]["short"][0]["seconds"] == {"scales": 2.0, "weights": 3.0}
    assert written["summary"]["q4_ratio_short"] == 1.2
    assert written["summary"]["q4_ratio_long"] == 1.01

    # one of them again, in the clone that is there
    offset = 1.0
    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: pytest.fail("cloned again"))
    monkeypatch.setattr("sys.argv", ["quality", "--keep", str(tmp_path / "clone"), "--runs", "1"])
    quality.main()
    written = json.loads((tmp_path / "quality.json").read_text())
    ratios = [run["q4_ratio"] for run in written["samples"]["short"]]
    assert ratios == pytest.approx([1.1, 1.3, 1.3])
    assert written["samples"]["long"] == kept["samples"]["long"]
