"""Error feedback against optimal brain surgery that inverts anew for every input, and coordinate
descent against a search through all levels; several layers at once against each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.quant import gptq
from lib.quant.codebook import assign, make_codebook, safe_ratio
from lib.quant.gptq import DAMPING, Feedback, damped, descend, error_feedback, output_error
from lib.quant.spec import Codebook
from lib.quant.ste import lookup


def _inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs ``[tokens, in]`` of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    size = torch.rand(columns, generator=generator) * 3 + 0.1
    return torch.randn(tokens, columns, generator=generator) @ mix * size


def _problem(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W, S and H."""
    generator = torch.Generator().manual_seed(seed + 100)
    weight = torch.randn(out, columns, generator=generator)
    scale = torch.rand(out, columns, generator=generator) + 1.0
    x = _inputs(4 * columns, columns, seed)
    return weight, scale, x.T @ x / len(x)


def _nearest(weight: Tensor, scale: Tensor, lut: Tensor) -> Tensor:
    return assign(safe_ratio(weight, scale), lut, affine=True)


def _feed(weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor) -> Feedback:
    """Error feedback for one layer."""
    found = error_feedback(weight[None], scale[None], lut[None], moments[None])
    return Feedback(*(part[0] for part in found))


def _descend(
    weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor, start: Feedback, steps: int
) -> Feedback:
    """Coordinate descent for one layer."""
    before = Feedback(*(part[None] for part in start))
    problem = (weight[None], scale[None], lut[None], moments[None])
    return Feedback(*(part[0] for part in descend(*problem, before, steps=steps)))


def _slow(weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor) -> Tensor:
    """Quantize the inputs by falling H_jj; after each, the free ones minimize the output error of
    what it missed: a least-squares problem that is solved as such."""
    damped = moments.double().clone()
    damped += torch.eye(len(damped), dtype=torch.float64) * DAMPING * damped.diagonal().mean()
    free = sorted(range(len(damped)), key=lambda j: -float(moments[j, j]))
    work, indices = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    while free:
        j = free.pop(0)
        for row in range(len(work)):
            ratios = float(work[row, j] / scale[row, j]) - lut.double()
            indices[row, j] = int(ratios.abs().argmin())
            missed = work[row, j] - lut[int(indices[row, j])].double() * scale[row, j].double()
            if free:  # minimize (d, missed) H (d, missed)^T over the correction d
                rest = damped[free][:, free]
                work[row, free] += torch.linalg.solve(rest, damped[free, j]) * missed
    return indices


@pytest.mark.parametrize("block", [1, 5, 128])
def test_is_optimal_brain_surgery(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, scale, moments = _problem(7, 12)
    lut = make_codebook(Codebook.UNIFORM, 4)
    found = _feed(weight, scale, lut, moments).indices
    assert torch.equal(found, _slow(weight, scale, lut, moments))
    assert not torch.equal(found, _nearest(weight, scale, lut))  # or feedback did nothing


@pytest.mark.parametrize("codebook", [Codebook.UNIFORM, Codebook.BALANCED])
@pytest.mark.parametrize("size", [4, 16])
def test_lowers_the_output_error_and_raises_the_weights(codebook: Codebook, size: int) -> None:
    weight, scale, moments = _problem(32, 48)
    lut = make_codebook(codebook, size)
    scale = scale / lut.max() * 2
    feedback = _feed(weight, scale, lut, moments).indices
    nearest = _nearest(weight, scale, lut)
    lost = [weight - lookup(lut, indices) * scale for indices in (feedback, nearest)]
    assert output_error(lost[0], moments) < 0.9 * output_error(lost[1], moments)
    assert lost[0].square().sum() > lost[1].square().sum()


def test_the_weight_with_feedback_has_the_chosen_level_nearest() -> None:
    weight, scale, moments = _problem(7, 300)
    lut = make_codebook(Codebook.UNIFORM, 4)
    found = _feed(weight, scale, lut, moments)
    assert torch.equal(_nearest(found.weight, scale, lut), found.indices)
    assert not torch.equal(_nearest(weight, scale, lut), found.indices)
    first = moments.diagonal().argmax()  # nothing was missed before it
    assert torch.equal(found.weight[:, first], weight[:, first])


def _slow_descent(
    weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor, start: Tensor, steps: int
) -> Tensor:
    """Every level is tried in the place of every index, by falling H_jj."""
    products, indices = damped(moments.double()), start.clone()
    order = sorted(range(len(products)), key=lambda j: -float(moments[j, j]))
    for j in order * steps:
        for row in range(len(weight)):
            errors = []
            for level in range(len(lut)):
                indices[row, j] = level
                lost = weight[row].double() - (lookup(lut, indices[row]) * scale[row]).double()
                errors.append(float(lost @ products @ lost))
            indices[row, j] = min(range(len(lut)), key=errors.__getitem__)
    return indices


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_descent_takes_the_best_level(
    block: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    problem = (*_problem(7, 12)[:2], make_codebook(Codebook.UNIFORM, 4), _problem(7, 12)[2])
    start = _feed(*problem)
    found = _descend(*problem, start, steps)
    assert torch.equal(found.indices, _slow_descent(*problem, start.indices, steps))
    assert torch.equal(found.indices, start.indices) == (steps == 0)
    assert torch.equal(found.indices, _nearest(found.weight, problem[1], problem[2]))


def test_descent_ends_where_no_single_change_helps() -> None:
    weight, scale, moments = _problem(16, 200)
    lut = make_codebook(Codebook.UNIFORM, 4)
    found = _feed(weight, scale, lut, moments)
    errors = []
    for _ in range(40):
        errors.append(output_error(weight - lookup(lut, found.indices) * scale, damped(moments)))
        found = _descend(weight, scale, lut, moments, found, 1)
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]
    again = _descend(weight, scale, lut, moments, found, 1)
    assert torch.equal(again.indices, found.indices)


def _fitted(size: int, seed: int) -> Tensor:
    """Levels that are not equally spaced."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(size, generator=generator) + 0.1).cumsum(0) - size / 3


def test_layers_side_by_side_are_as_each_alone() -> None:
    problems = []
    for seed in range(4):
        weight, scale, moments = _problem(9, 70, seed)
        problems.append((weight, scale, _fitted(8, seed), moments))
    together = tuple(torch.stack(parts) for parts in zip(*problems, strict=True))
    fed = error_feedback(*together)
    found = descend(*together, fed, steps=2)
    for n, problem in enumerate(problems):
        alone = _feed(*problem)
        assert torch.equal(fed.indices[n], alone.indices)
        torch.testing.assert_close(fed.weight[n], alone.weight, rtol=1e-4, atol=1e-4)
        further = _descend(*problem, alone, 2)
        assert torch.equal(found.indices[n], further.indices)
        assert not torch.equal(further.indices, alone.indices)
        torch.testing.assert_close(found.weight[n], further.weight, rtol=1e-4, atol=1e-4)


def test_levels_that_are_not_equally_spaced() -> None:
    weight, scale, moments = _problem(7, 12)
    lut = _fitted(4, 0)
    found = _feed(weight, scale, lut, moments)
    assert torch.equal(found.indices, _slow(weight, scale, lut, moments))
    after = _descend(weight, scale, lut, moments, found, 2)
    assert torch.equal(after.indices, _slow_descent(weight, scale, lut, moments, found.indices, 2))


def test_uncorrelated_inputs_take_the_nearest_level() -> None:
    weight, scale, _ = _problem(8, 16)
    lut = make_codebook(Codebook.UNIFORM, 4)
    moments = torch.diag(torch.rand(16) + 0.1)
    found = _feed(weight, scale, lut, moments).indices
    assert torch.equal(found, _nearest(weight, scale, lut))


def test_inputs_that_are_never_used_and_scales_of_zero() -> None:
    weight, scale, moments = _problem(8, 16)
    moments[:, 3] = moments[3] = 0
    scale[2, 5] = 0
    lut = make_codebook(Codebook.UNIFORM, 4)
    found = _feed(weight, scale, lut, moments).indices
    assert int(found.max()) < 4
    assert torch.equal(found[:, 3], _nearest(weight, scale, lut)[:, 3])


def test_fewer_samples_than_inputs() -> None:
    weight, scale, _ = _problem(8, 32)
    x = _inputs(5, 32)  # H has rank 5
    moments = x.T @ x / len(x)
    lut = make_codebook(Codebook.UNIFORM, 4)
    found = _feed(weight, scale, lut, moments).indices
    lost = [weight - lookup(lut, i) * scale for i in (found, _nearest(weight, scale, lut))]
    assert output_error(lost[0], moments) < output_error(lost[1], moments)


def test_output_error_is_that_of_the_outputs() -> None:
    weight, _, _ = _problem(6, 10)
    x = _inputs(40, 10)
    direct = (x @ weight.T).square().sum(dim=1).mean()
    torch.testing.assert_close(
        torch.tensor(output_error(weight, x.T @ x / len(x))), direct, rtol=1e-5, atol=0
    )
