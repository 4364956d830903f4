"""The comparison with other quantizers, as far as none of them is needed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import peers, record
from benchmarks.budget import Made, Trial, Work, iterations_for, steps_for, steps_of
from benchmarks.peer_report import draw, table
from benchmarks.peers import METHODS, Method, Setting, check_apart, kept, sample, write
from benchmarks.quantizers import linear_layers, round_to_nearest, rtn
from benchmarks.storage import Storage, bits_per_weight, integers, most_values, palette
from benchmarks.training import at_once, staged
from lib.base.errors import InputError, MismatchError
from lib.model.load import load_causal_lm
from lib.model.size import model_size
from lib.model.surgery import quantize_model
from lib.params.load import load_params
from lib.params.schema import Evaluate
from lib.params.specs import model_spec
from tests import bad_input as bad

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("storage", "bits"),
    [
        (integers(4, 64, zero_bits=0), 4 + 16 / 64),
        (integers(4, 64, zero_bits=4), 4 + 20 / 64),
        (integers(2, 64, zero_bits=16), 2.5),
        (integers(2, 192, zero_bits=0), 2 + 2 * 16 / 320),  # 320 inputs are two groups, one short
        (palette(4, 1), 4 + 16 * 16 / 320),
        (palette(4, 2), 4 + 3 * 16 * 16 / (5 * 320)),  # 5 outputs are three groups
        (Storage(bits=3, rows=0, shared=8 * 16), 3 + 8 * 16 / (5 * 320)),
    ],
)
def test_every_bit_is_counted(storage: Storage, bits: float) -> None:
    weights = {"a": torch.zeros(5, 320), "b": torch.zeros(5, 320)}
    assert bits_per_weight(weights, storage) == pytest.approx(bits)


def test_layers_count_by_their_size() -> None:
    weights = {"a": torch.zeros(2, 64), "b": torch.zeros(6, 128)}
    found = bits_per_weight(weights, palette(2, 1))
    assert found == pytest.approx(2 + 64 * (2 + 6) / (2 * 64 + 6 * 128))


def slow_most_values(weight: Tensor, rows: int, columns: int) -> int:
    return max(
        len(set(weight[top : top + rows, left : left + columns].flatten().tolist()))
        for top in range(0, weight.shape[0], rows)
        for left in range(0, weight.shape[1], columns)
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (1, 5), (2, 12), (3, 7), (5, 12)])
def test_values_of_a_group_are_counted(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 9, (5, 12), generator=generator).float()
    storage = Storage(bits=4, rows=rows, columns=columns, shared=0)
    assert most_values(weight, storage) == slow_most_values(weight, rows, columns)


@pytest.mark.parametrize(
    ("changed", "words"),
    [(0.5, "b has 5 values in a group, 2 bits are 4"), (math.nan, "b .*finite")],
)
def test_weights_that_do_not_fit_their_bits_are_refused(changed: float, words: str) -> None:
    weights = {name: torch.arange(4.0).repeat(3, 4) for name in "ab"}
    storage = integers(2, 8, zero_bits=0)
    assert bits_per_weight(weights, storage) == 4
    weights["b"][2, 9] = changed
    with pytest.raises(MismatchError, match=words):
        bits_per_weight(weights, storage)


def slow_rounding(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Group by group: every value goes to the nearest of all levels."""
    result = weight.clone()
    for output in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[output, start : start + group_size]
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
            zero = round(-low / scale)
            levels = (torch.arange(2**bits) - zero) * scale
            nearest = (group[:, None] - levels).abs().argmin(dim=1)
            result[output, start : start + group_size] = levels[nearest]
    return result


@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (2, 16), (3, 48)])
def test_rounding_to_nearest_is_that_of_a_slow_reference(bits: int, group_size: int) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    weight[3] = weight[3].abs() + 0.5  # no group of it has a negative value
    weight[4] = 0.0
    found = round_to_nearest(weight, bits, group_size)
    rest = torch.tensor([0, 1, 2, 3, 5])
    torch.testing.assert_close(found[rest], slow_rounding(weight[rest], bits, group_size))
    assert not found[4].any()
    with pytest.raises(ValueError, match="48 inputs are no multiple of 20"):
        round_to_nearest(weight, bits, 20)


@pytest.mark.parametrize("rows", [4, 20, 1000])
def test_steps_use_the_budget_and_no_more(rows: int) -> None:
    step, sequence, batch, seconds = 4.0, 0.3, 4, 100.0

    def cost(steps: int) -> float:
        return steps * step + min(rows, steps * batch) * sequence

    steps = steps_for(seconds, step, sequence, batch, rows)
    assert cost(steps) <= seconds < cost(steps + 1)
    assert steps_for(1.0, step, sequence, batch, rows) == 1


def test_iterations_use_the_budget_and_no_more() -> None:
    def took(blocks: int, iterations: int) -> float:
        return 3 + blocks * (0.5 + 0.2 * iterations)

    sizes = ((1, 4), (2, 4), (2, 12))
    one, two, longer = (Trial(blocks=b, iterations=n, seconds=took(b, n)) for b, n in sizes)
    found = iterations_for(100.0, 30, (one, two, longer))
    assert took(30, found) <= 100 < took(30, found + 1)
    assert iterations_for(1.0, 30, (one, two, longer)) == 1
    with pytest.raises(InputError, match="too busy"):
        iterations_for(100.0, 30, (one, two, replace(longer, seconds=two.seconds)))


def test_steps_are_shared_out() -> None:
    assert steps_of([12, 12, 6], 20) == [8, 8, 4]
    assert steps_of([12, 12, 6], 1) == [1, 1, 1]


def test_rows_that_were_trained_on_are_refused() -> None:
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    check_apart(rows[:2], rows[2:])
    with pytest.raises(InputError, match="1 of 3 test rows"):
        check_apart(rows[:2], rows[1:])


def test_methods_have_packages_that_are_pinned() -> None:
    pinned = "".join((ROOT / f"requirements{x}.txt").read_text() for x in ("", "-peers"))
    needed = {method.package for method in METHODS.values()} - {None}
    assert needed == set(peers.PACKAGES)
    assert [package for package in needed if f"{package}==" not in pinned] == []


def refuse(work: Work) -> Made:
    raise ValueError("a reason\nwith | two lines")


def leave(work: Work) -> Made:
    raise SystemExit(3)


def die(work: Work) -> Made:
    os._exit(3)


def hang(work: Work) -> Made:
    time.sleep(3600)
    raise AssertionError("nobody ended this process")


def setting_of(data: Path, **changes: Any) -> Setting:
    evaluate = Evaluate(
        perplexity_window=32, perplexity_stride=16, perplexity_tokens=90, sequences=3
    )
    setting = Setting(
        data=data, params=Path("params.yaml"), budget=2.0, threads=1, evaluate=evaluate
    )
    return replace(setting, **changes)


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (refuse, "failed: ValueError: a reason with / two lines"),
        (leave, "failed: SystemExit: 3"),
        (die, "failed: its process died"),
    ],
)
def test_a_failure_is_a_row_of_one_line(tmp_path: Path, make: Any, status: str) -> None:
    assert sample(Method(make=make, about="x"), setting_of(tmp_path)) == {
        "status": status,
        "about": "x",
    }


def test_a_method_that_hangs_is_ended(tmp_path: Path) -> None:
    setting = setting_of(tmp_path, limit=0.25)
    found = sample(Method(make=hang, about="x"), setting)
    assert found == {"status": "failed: no result after 0.25 s", "about": "x"}
    assert not multiprocessing.active_children()


def test_a_peer_that_is_not_installed_is_said_to_be_so(tmp_path: Path) -> None:
    method = Method(make=die, about="x", package="no-such-quantizer")
    assert sample(method, setting_of(tmp_path)) == {"status": "not installed", "about": "x"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project with teacher, tokens and cache."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        patch.chdir(folder)
        bad.make_project(folder)
        for stage in ("teacher", "tokens", "cache"):
            bad.run_stage(stage)
    return folder / "data"


def test_weights_are_measured_in_the_place_of_the_teachers(project: Path) -> None:
    setting = setting_of(project)
    own = peers.produce(None, setting)
    assert (own["kl"], own["top1"]) == (pytest.approx(0, abs=1e-6), 1)
    work = Work(data=project, params=setting.params, seconds=1)
    fine, coarse = (peers.measure(setting, rtn(work, bits, 16)) for bits in (8, 2))
    assert 0 < fine["kl"] < 0.01 < coarse["kl"]
    assert own["perplexity"] == pytest.approx(fine["perplexity"], rel=0.01)
    assert (own["scored_tokens"], fine["scored_positions"]) == (89, own["scored_positions"])
    layers = linear_layers(load_causal_lm(project / "teacher"))
    missing = Made(weights={n: m.weight for n, m in list(layers.items())[1:]}, bits=16)
    with pytest.raises(MismatchError, match=f"{len(layers) - 1} weights for {len(layers)} layers"):
        peers.measure(setting, missing)


def test_a_recipe_of_this_project_trains_within_its_budget(project: Path) -> None:
    quant = {"lut_size": 4, "rank": 2, "group_size": 16, "scale": "directional"}
    quant |= {"init": "importance"}
    method = Method(
        make=at_once,
        about="x",
        settings={
            "quant": quant,
            "rates": {"weight": 1e-3, "scale_direction": 1e-3},
            "sequences": 2,
        },
    )
    found = peers.produce(method, setting_of(project))
    assert found["run"]["steps"] >= 1
    assert found["run"]["kd_after"] <= found["run"]["kd_before"]
    assert 2 < found["bits"] < 8
    assert found["run"]["teacher_seconds"] > 0
    # the budget is used, and what is beyond it is a rounding to whole steps and evaluations
    assert found["seconds"] > found["run"]["teacher_seconds"]


def test_the_default_recipe_is_that_of_the_params_file(project: Path) -> None:
    setting = setting_of(project, params=project.parent / "params.yaml")
    found = peers.produce(Method(make=staged, about="x"), setting)
    params = load_params(setting.params)
    stages = [stage for stage in (params.scales, params.weights, params.finetune) if stage.steps]
    assert [phase["steps"] >= 1 for phase in found["run"]["phases"]] == [True] * len(stages) != []
    work = Work(data=project, params=setting.params, seconds=1)
    model = load_causal_lm(project / "teacher")
    plain = params.quant.model_copy(update={"init": "maxabs"})  # takes the same bits
    quantize_model(model, model_spec(plain))
    assert found["bits"] == model_size(model).bits_per_layer_weight
    assert found["kl"] < peers.measure(setting, rtn(work, 2, 16))["kl"]


TEACHER = {
    "status": "ok",
    "about": "as it is",
    "bits": 16,
    "perplexity": 20.0,
    "kl": 0.0,
    "top1": 1.0,
    "scored_tokens": 1535,
    "scored_positions": 762,
}
FOUND = {
    **TEACHER,
    "about": "groups of 64",
    "bits": 4.3125,
    "perplexity": 25.0,
    "kl": 0.25,
    "top1": 0.75,
    "seconds": 12.4,
    "peak_bytes": 1.5e9,
    "run": {"steps": 30, "phases": []},
}
SAMPLES = {
    "teacher": TEACHER,
    "rtn-4": FOUND,
    "rtn-2": {**FOUND, "bits": 2.5, "perplexity": None, "kl": None},
    "hqq-4": {"status": "not installed", "about": "groups of 64"},
    "autoround-4": {"status": "failed: ValueError: a reason", "about": "groups of 64"},
    "lutqat-4": {**FOUND, "bits": 4.18},
    "lutqat-2": {**FOUND, "bits": 2.5, "perplexity": 1e6},
}
CONFIG = {"budget": 180.0, "threads": 2}


def test_the_table_has_every_method() -> None:
    lines = table(SAMPLES, CONFIG, {"hqq": "not installed", "torchao": "1.0"}).splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(SAMPLES)]}) == 1
    assert lines[2].startswith("| `teacher`: as it is | 16.00 | 20.00 | 1.000 | 0.0000 | 1.0000 | ")
    assert lines[3] == (
        "| `rtn-4`: groups of 64 | 4.31 | 25.00 | 1.250 | 0.2500 | 0.7500 | 12 | 1.50 | 30 steps |"
    )
    assert lines[4].startswith("| `rtn-2`: groups of 64 | 2.50 | not finite | not finite | not f")
    assert lines[5].startswith("| `hqq-4`: groups of 64 | not installed |")
    assert lines[6].startswith("| `autoround-4`: groups of 64 | failed: ValueError: a reason |")
    assert "1e+06" in lines[8]
    assert "1535 test tokens" in lines[-1] and "hqq not installed, torchao 1.0" in lines[-1]


def test_the_figure_shows_what_was_measured() -> None:
    (axes,) = draw(SAMPLES).axes
    shown = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }
    assert shown["rtn"] == ([4.3125], [25.0])
    assert shown["lutqat"] == ([2.5, 4.18], [1e6, 25.0])
    assert shown["teacher"][1] == [20.0, 20.0]
    assert set(shown) == {"rtn", "lutqat", "teacher"}
    assert axes.get_yscale() == "log"


def test_results_of_methods_that_are_not_run_again_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    setting = setting_of(tmp_path)
    path = tmp_path / "peers.json"
    assert kept(path, setting, ["rtn-4"]) == {}
    write(SAMPLES, setting, record.machine())
    values = json.loads(path.read_text())
    assert list(values["samples"]) == [name for name in ("teacher", *METHODS) if name in SAMPLES]
    assert values["summary"]["rtn-4_bits"] == 4.3125
    assert "rtn-2_perplexity" not in values["summary"]
    assert {"torch", "hqq", "auto-round", "torchao"} <= set(values["versions"])
    assert (tmp_path / "peers.md").read_text().startswith("| method |")
    assert b"<svg" in (tmp_path / "peers.svg").read_bytes()
    others = {name: found for name, found in SAMPLES.items() if name != "rtn-4"}
    assert kept(path, setting, ["rtn-4"]) == others
    longer = replace(setting, budget=3.0)
    with pytest.raises(InputError, match=r"figures for budget 2.0, and 3.0 is asked"):
        kept(path, longer, ["rtn-4"])
    other = replace(setting, evaluate=Evaluate(perplexity_tokens=91, sequences=3))
    with pytest.raises(InputError, match="figures for evaluate"):
        kept(path, other, ["rtn-4"])
