"""Both methods that train one block at a time: what they learn, and going on after a kill."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lib.base.errors import NonFiniteError, ParamsError
from lib.model.blocks import block_prefix, decoder_blocks, part
from lib.objective.distillation import make_objective
from lib.objective.loss import held_out_loss
from lib.params.methods import Blockwise, Layerwise
from lib.params.training import TrainConfig
from lib.train.blockwise import BlockwiseMethod, block_epochs
from lib.train.by_block import BlockMethod, Task, held_out_kd, train_by_block, trainables_of
from lib.train.layerwise import LayerwiseMethod
from lib.train.roles import select
from lib.train.state import Progress
from tests.tiny_models import CPU, make_caches, quantized, readers, same, state_of, tiny_model
from tests.train.samples import config, quiet

METHODS = ("layerwise", "blockwise")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_caches(tmp_path_factory.mktemp("cache"), rows=32)


def method_of(
    name: str,
    model: PreTrainedModel,
    cache: Path,
    scratch: Path,
    params: TrainConfig,
    **changes: Any,
) -> BlockMethod:
    train, val = readers(cache)
    objective = make_objective(train, temperature=2.0, target="candidates")
    teacher = changes.pop("teacher", None) or tiny_model()

    def full(number: int) -> torch.nn.Module:
        return part(teacher, number, number + 1, norm=False)

    task = Task(model, params, objective, train, val, CPU, scratch)
    if name == "layerwise":
        return LayerwiseMethod(task, full=full, layerwise=Layerwise(**changes))
    epochs = changes.pop("each", [changes.get("epochs", 2.0)] * 2)
    return BlockwiseMethod(
        task,
        full=full,
        embeddings=teacher.get_input_embeddings(),
        blockwise=Blockwise(**changes),
        epochs=epochs,
    )


def student() -> PreTrainedModel:
    return quantized(lut_size=4)


def run(name: str, cache: Path, scratch: Path, **changes: Any) -> tuple[PreTrainedModel, Progress]:
    model = student()
    settings = {key: changes.pop(key) for key in list(changes) if key in TrainConfig.model_fields}
    made = method_of(name, model, cache, scratch, config(**settings), **changes)
    return model, train_by_block(made, scratch, quiet)


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_model_gets_better_block_by_block(name: str, cache: Path, tmp_path: Path) -> None:
    epochs = {"epochs": 8.0} if name == "blockwise" else {}
    model, progress = run(name, cache, tmp_path, steps=32, **epochs)
    assert progress.best_loss < 0.97 * progress.initial_loss
    train, val = readers(cache)
    objective = make_objective(train, temperature=2.0, target="candidates")
    assert held_out_loss(model, objective, val, 16, CPU) == pytest.approx(progress.best_loss)
    assert not any(p.requires_grad for p in model.parameters())
    blocks = [row["block"] for row in progress.rows if "block" in row]
    assert blocks == sorted(blocks) and set(blocks) == {0, 1}
    steps = [row["step"] for row in progress.rows]
    assert steps == sorted(steps) and steps[-1] == progress.step == progress.best_step


@pytest.mark.parametrize("name", METHODS)
def test_only_the_block_at_work_changes(name: str, cache: Path, tmp_path: Path) -> None:
    model = student()
    before = state_of(model)
    made = method_of(name, model, cache, tmp_path, config(steps=4))
    trainer = made.trainer(1, tmp_path / "one")
    trainer.run(quiet)
    changed = {key for key, value in state_of(model).items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(block_prefix(model, 1)) for key in changed)
    assert all(item.name.startswith(block_prefix(model, 1)) for item in trainer.trainables)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", [1, 5, 8, 13])
def test_a_killed_run_goes_on_bit_for_bit(
    name: str, when: int, cache: Path, tmp_path: Path
) -> None:
    whole, expected = (
        run(name, cache, tmp_path / "whole", steps=8, epochs=2.0)
        if (name == "blockwise")
        else run(name, cache, tmp_path / "whole", steps=8)
    )
    settings = config(steps=8)

    def kill(progress: Progress) -> None:
        if progress.step == when:
            raise Killed

    parts = tmp_path / "parts"
    with pytest.raises(Killed):
        train_by_block(method_of(name, student(), cache, parts, settings), parts, kill)
    model = student()
    seen: list[int] = []
    progress = train_by_block(
        method_of(name, model, cache, parts, settings),
        parts,
        lambda progress: seen.append(progress.step),
    )
    assert same(state_of(model), state_of(whole))
    assert progress == expected
    # what was saved inside the block is not done again
    assert seen[0] > when - settings.checkpoint_every and seen[-1] == progress.step


@pytest.mark.parametrize(
    "file", ["start.json", "000.json", "000.safetensors", "000-plain.safetensors"]
)
def test_a_block_that_was_damaged_since_is_trained_anew(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    whole, expected = run("layerwise", cache, tmp_path / "whole", steps=4, ema=0.5)
    settings, parts, model = config(steps=4, ema=0.5), tmp_path / "parts", student()

    def kill(progress: Progress) -> None:
        if progress.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train_by_block(method_of("layerwise", student(), cache, parts, settings), parts, kill)
    path = parts / "blocks" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    progress = train_by_block(method_of("layerwise", model, cache, parts, settings), parts, quiet)
    assert same(state_of(model), state_of(whole)) and progress == expected
    assert ("training block 0 anew" in capsys.readouterr().err) is (file != "start.json")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", [3, 13])
def test_plain_parameters_of_blocks_resume_bit_for_bit(
    name: str, when: int, cache: Path, tmp_path: Path
) -> None:
    settings = config(steps=8, ema=0.6)

    def made(scratch: Path) -> BlockMethod:
        return method_of(name, student(), cache, scratch, settings)

    def kill(progress: Progress) -> None:
        if progress.step == when:
            raise Killed

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = made(whole)
    train_by_block(expected, whole, quiet)
    with pytest.raises(Killed):
        train_by_block(made(parts), parts, kill)
    found = made(parts)
    train_by_block(found, parts, quiet)
    model = found.task.model
    assert same(state_of(model), state_of(expected.task.model))
    assert same(found.plain, expected.plain)
    assert found.plain.keys() == {item.name for item in select(student(), settings)}
    assert any(not torch.equal(model.get_parameter(n), v) for n, v in found.plain.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_non_finite_loss_names_block_and_step(name: str, cache: Path, tmp_path: Path) -> None:
    model = student()
    made = method_of(name, model, cache, tmp_path, config(steps=4))

    def spoil(progress: Progress) -> None:
        if progress.step == 6 if name == "layerwise" else progress.step == 10:
            block: Any = decoder_blocks(model)[1]
            with torch.no_grad():
                block.mlp.up_proj.scale.g.fill_(math.nan)

    with pytest.raises(NonFiniteError, match=r"block 1: .*step \d.*up_proj"):
        train_by_block(made, tmp_path, spoil)


def test_epochs_follow_the_scores() -> None:
    assert block_epochs(2.0, 0.25, [1.0, 3.0, 2.0]) == [2.0, 2.5, 2.25]
    assert block_epochs(2.0, 0.25, [5.0, 5.0]) == [2.0, 2.0]
    assert block_epochs(2.0, 0.0, [1.0, 3.0]) == [2.0, 2.0]


def test_fractions_of_epochs_are_trained_and_logged(cache: Path, tmp_path: Path) -> None:
    _, progress = run("blockwise", cache, tmp_path, each=[2.5, 1.0], eval_sequences=8)
    rows = [row for row in progress.rows if "block" in row]
    per_epoch = 32 / 8
    for block, epochs in ((0, 2.5), (1, 1.0)):
        mine = [row for row in rows if row["block"] == block]
        assert len(mine) == 1 + epochs * per_epoch and mine[-1]["epoch"] == epochs
        measured = [row["epoch"] for row in mine if row.get("val_block_loss") is not None]
        assert measured == ([0.0, 1.0, 2.0, 2.5] if block == 0 else [0.0, 1.0])


def test_early_stopping_ends_a_block(cache: Path, tmp_path: Path) -> None:
    hopeless = {"rates": {"weight": 10.0, "scale_direction": 0.0, "scale_magnitude": 0.0}}
    _, progress = run("blockwise", cache, tmp_path / "a", epochs=5.0, patience=2, **hopeless)
    _, whole = run("blockwise", cache, tmp_path / "b", epochs=5.0, **hopeless)
    assert max(row.get("epoch", 0.0) or 0.0 for row in progress.rows) == 2.0
    assert max(row.get("epoch", 0.0) or 0.0 for row in whole.rows) == 5.0
    assert progress.best_loss == pytest.approx(progress.initial_loss)  # the start was the best


def test_memory_and_disk_do_not_grow_with_depth(cache: Path, tmp_path: Path) -> None:
    found = []
    for depth in (2, 5):
        model, teacher = student(), tiny_model()
        for made in (model, teacher):
            blocks = decoder_blocks(made)
            blocks.extend(copy.deepcopy(blocks[1]) for _ in range(depth - 2))
            made.config.num_hidden_layers = depth
        folder = tmp_path / str(depth)
        each = [1.0] * depth
        method = method_of("blockwise", model, cache, folder, config(), teacher=teacher, each=each)
        trainer = method.trainer(depth - 1, folder / "block")
        row = trainer.train_step()
        state = trainer.optimizer.state.values()
        moments = sum(v.numel() for entry in state for v in entry.values())
        trained = sum(item.parameter.numel() for item in trainer.trainables)
        assert row["loss"] > 0 and sum(p.requires_grad for p in model.parameters()) == 28
        files = sorted(file.parent.name for file in folder.rglob("*.npy"))
        found.append((moments, trained, files))
    assert found[0] == found[1]
    assert found[0][2] == ["train-full", "train-own", "val-full", "val-own"]


def test_no_clipping_unless_asked(cache: Path, tmp_path: Path) -> None:
    params = config(clip=1e-3)
    free = method_of("blockwise", student(), cache, tmp_path / "a", params)
    assert free.trainer(0, tmp_path / "x").params.clip == 0.0
    held = method_of("blockwise", student(), cache, tmp_path / "b", params, clip=0.5)
    assert held.trainer(0, tmp_path / "y").params.clip == 0.5


def test_held_out_kd_by_blocks_is_the_whole_models(cache: Path) -> None:
    model = student()
    train, val = readers(cache)
    objective = make_objective(train, temperature=2.0, target="candidates", hard_top1_weight=1.0)
    found = held_out_kd(model, objective, val, 11, CPU)
    assert found == pytest.approx(held_out_loss(model, objective, val, 11, CPU), rel=1e-6)


def test_a_block_with_nothing_to_train_is_named() -> None:
    with pytest.raises(ParamsError, match="nothing of block 1 trains"):
        trainables_of(student(), config(freeze_last_mlp=1, train_mlp_only=True), 1)
