"""The moving average, the best step, and the plain parameters beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.model.checkpoint import load_checkpoint, read_config
from lib.model.surgery import has_masters, quantized_layers
from lib.params.training import Rates
from lib.train import average as average_module
from lib.train.average import PLAIN, Kept, put_plain, save_trained, snapshot
from lib.train.roles import select
from lib.train.run import start_from_checkpoint
from lib.train.state import Progress
from tests.tiny_models import logits_of, quantized, same, state_of
from tests.train.killing import KilledError
from tests.train.samples import BOTH, config, quiet, trainer


def followed(cache: Path, scratch: Path, params: Any, spoil_after: int) -> Any:
    """Trainer, result, and plain and averaged parameters after every step, the average by its
    equation. After step ``spoil_after`` the parameters become useless: no later step is best."""
    made = trainer(quantized(lut_size=4), cache, scratch, params)
    plain = [snapshot(made.trainables)]
    slow = [plain[0]]

    def follow(progress: Progress) -> None:
        plain.append(snapshot(made.trainables))
        slow.append(
            {n: params.ema * slow[-1][n] + (1 - params.ema) * v for n, v in plain[-1].items()}
        )
        if progress.step == spoil_after:
            with torch.no_grad():
                for item in made.trainables:
                    item.parameter.mul_(3)

    return made, made.run(follow), plain, slow


def test_plain_parameters_are_those_of_the_best_step(cache: Path, tmp_path: Path) -> None:
    params = config(ema=0.7, steps=6, eval_every=1, rates=BOTH)
    made, result, plain, slow = followed(cache, tmp_path, params, spoil_after=3)
    best = result.progress.best_step
    assert 0 < best <= 3
    assert same(result.plain, plain[best])
    for item in made.trainables:
        assert torch.allclose(item.parameter, slow[best][item.name], rtol=1e-5, atol=1e-6)
    assert not same(result.plain, snapshot(made.trainables))


def test_without_an_average_nothing_is_kept_beside(cache: Path, tmp_path: Path) -> None:
    made = trainer(quantized(), cache, tmp_path, config())
    assert made.run(quiet).plain == {}
    assert made.kept.average == {}
    assert made.kept.tensors().keys() == {f"best.{t.name}" for t in made.trainables}


def test_what_is_kept_survives_its_own_names() -> None:
    chosen = select(quantized(), config())
    kept = Kept(0.5)
    kept.start(chosen)
    with torch.no_grad():
        for item in chosen:
            item.parameter.add_(1)
    kept.follow(chosen)
    kept.keep(chosen)
    again = Kept(0.5)
    again.load({**kept.tensors(), "scaler": torch.ones(2)}, chosen)
    for name in ("best", "average", "plain"):
        assert same(getattr(again, name), getattr(kept, name))
    assert same(kept.plain, snapshot(chosen)) and same(kept.best, kept.average)
    item = chosen[0]
    assert torch.allclose(kept.average[item.name], item.parameter - 0.5, atol=1e-6)


def test_evaluation_sees_the_average_and_leaves_the_parameters() -> None:
    chosen = select(quantized(), config())
    kept = Kept(0.9)
    kept.start(chosen)
    first = snapshot(chosen)
    with torch.no_grad():
        for item in chosen:
            item.parameter.mul_(2)
    now = snapshot(chosen)
    with kept.evaluated(chosen):
        assert same(snapshot(chosen), first)
    assert same(snapshot(chosen), now)
    with Kept(0.0).evaluated(chosen):
        assert same(snapshot(chosen), now)


def moved(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other parameters, so different that indices differ."""
    noise = torch.Generator().manual_seed(4)
    return {n: v * (1 + 0.3 * torch.randn(v.shape, generator=noise)) for n, v in values.items()}


def test_put_plain_gives_weights_the_indices_that_follow() -> None:
    model = quantized(lut_size=4)
    plain = moved(snapshot(select(model, config(rates=BOTH))))
    before = {name: layer.indices.clone() for name, layer in quantized_layers(model).items()}
    put_plain(model, plain)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in plain.items())
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.nearest_indices(), layer.indices)
        assert not torch.equal(layer.indices, before[name])


def test_put_plain_leaves_indices_that_were_frozen() -> None:
    model = quantized(lut_size=4)
    plain = moved(snapshot(select(model, config(rates=Rates(scale_direction=1e-3)))))
    before = {name: layer.indices.clone() for name, layer in quantized_layers(model).items()}
    put_plain(model, plain)
    layers = quantized_layers(model)
    assert all(torch.equal(layers[name].indices, before[name]) for name in layers)
    assert any(not torch.equal(x.nearest_indices(), x.indices) for x in layers.values())


INFO = {"stage": "weights", "teacher": "t", "result": {"best_kd": 1.0}}


def test_both_checkpoints_in_one_folder(tmp_path: Path) -> None:
    model = quantized(lut_size=4)
    plain = moved(snapshot(select(model, config(rates=BOTH))))
    averaged = state_of(model)
    folder = tmp_path / "model"
    save_trained(model, plain, folder, tmp_path, INFO)
    first, info = load_checkpoint(folder)
    assert same(state_of(first), averaged) and info == {**INFO, "averaged": True}
    second, info = load_checkpoint(folder / PLAIN)
    assert info == {"stage": "weights", "teacher": "t", "averaged": False}  # it was not measured
    assert all(torch.equal(second.get_parameter(name), value) for name, value in plain.items())
    assert same(state_of(second), state_of(model)) and has_masters(second)
    assert not torch.equal(logits_of(first), logits_of(second))
    following = start_from_checkpoint(folder / PLAIN)
    assert following.parent == read_config(folder / PLAIN)["fingerprint"]
    assert following.parent != read_config(folder)["fingerprint"]

    save_trained(model, {}, folder, tmp_path, INFO)  # in place of both
    assert not (folder / PLAIN).exists()
    assert load_checkpoint(folder)[1] == INFO


def test_both_or_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(lut_size=4)
    plain = snapshot(select(model, config(rates=BOTH)))
    save_trained(model, {}, tmp_path / "model", tmp_path, INFO)
    before = sorted(file.name for file in (tmp_path / "model").iterdir())

    def dies(*_args: object) -> None:
        raise KilledError

    monkeypatch.setattr(average_module, "put_plain", dies)
    with pytest.raises(KilledError):
        save_trained(model, plain, tmp_path / "model", tmp_path, INFO)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
