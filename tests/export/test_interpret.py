"""Operations against PyTorch's own; what is not known is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib.base.errors import InputError
from lib.export.interpret import Interpreter, constant_weight
from lib.export.package import Function, Name, Operation, Output

X = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))


def _const(name: str, value: Any) -> Operation:
    return Operation("const", name, {}, {"val": value}, [Output(name, "FLOAT16", ())])


def _op(kind: str, **inputs: Any) -> Operation:
    bound = {k: v if isinstance(v, list) else [v] for k, v in inputs.items()}
    return Operation(kind, "y", bound, {}, [Output("y", "FLOAT16", ())])


def _run(*operations: Operation, **inputs: torch.Tensor) -> torch.Tensor:
    function = Function(inputs=[], operations=list(operations), results=["y"])
    return Interpreter(function).run({"x": X, **inputs})["y"]


ints = lambda *values: np.array(values, dtype=np.int32)  # noqa: E731
yes = np.array(True)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (_op("reshape", x=Name("x"), shape=ints(2, 18, 4)), X.reshape(2, 18, 4)),
        (_op("transpose", x=Name("x"), perm=ints(0, 2, 1, 3)), X.permute(0, 2, 1, 3)),
        (_op("expand_dims", x=Name("x"), axes=ints(0, 2)), X[None][:, :, None]),
        (_op("squeeze", x=Name("x"), axes=ints(0)), X.squeeze(0)),
        (_op("softmax", x=Name("x"), axis=ints(-1)), X.softmax(-1)),
        (_op("silu", x=Name("x")), F.silu(X)),
        (_op("clip", x=Name("x"), alpha=np.float32(-1), beta=np.float32(0.5)), X.clamp(-1, 0.5)),
        (_op("reduce_max", x=Name("x"), axes=ints(1), keep_dims=yes), X.amax(1, keepdim=True)),
        (_op("reduce_sum", x=Name("x"), axes=ints(2)), X.sum(2)),
        (_op("rsqrt", x=Name("z"), epsilon=np.float32(0.5)), (X.square() + 0.5).rsqrt()),
        (_op("matmul", x=Name("x"), y=Name("x"), transpose_y=yes), X @ X.transpose(-1, -2)),
        (_op("concat", values=[Name("x"), Name("x")], axis=ints(1)), torch.cat([X, X], 1)),
        (_op("gather", x=Name("x"), indices=ints(2, 0), axis=ints(1)), X[:, [2, 0]]),
        (
            _op(
                "slice_by_index",
                x=Name("x"),
                begin=ints(0, 1, 0, 1),
                end=ints(0, 4, 0, 3),
                begin_mask=np.array([True, False, True, False]),
                end_mask=np.array([True, False, True, False]),
            ),
            X[:, 1:4, :, 1:3],
        ),
        (
            _op(
                "slice_by_index",
                x=Name("x"),
                begin=ints(1, 0, 0, 0),
                end=ints(0, 0, 0, 0),
                end_mask=np.array([True, True, True, True]),
                squeeze_mask=np.array([True, False, False, False]),
            ),
            X[1],
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Operation) else "",
)
def test_operations(operation: Operation, expected: torch.Tensor) -> None:
    assert torch.equal(_run(operation, z=X.square()), expected)


def test_constants_and_lut_weights() -> None:
    lut = np.array([-1, 0.5], np.float16).reshape(1, 1, 1, 1, 2, 1)
    indices = np.array([[0, 1], [1, 1]], np.uint8).reshape(2, 2, 1, 1)
    weight = Operation(
        "constexpr_lut_to_dense",
        "w",
        {"indices": [indices], "lut": [lut]},
        {},
        [Output("w", "FLOAT16", (2, 2, 1, 1))],
    )
    x = torch.randn(1, 2, 1, 5)
    y = _run(weight, _op("conv", x=Name("x"), weight=Name("w")), x=x)
    dense = torch.tensor([[-1, 0.5], [0.5, 0.5]])[:, :, None, None]
    assert torch.equal(y, F.conv2d(x, dense))
    assert torch.equal(
        _run(_const("c", np.float16(2)), _op("mul", x=Name("x"), y=Name("c"))), 2 * X
    )


def test_packed_indices_of_the_older_form() -> None:
    weight = Operation(
        "constexpr_lut_to_dense",
        "w",
        {},
        {
            "indices": np.array([0b11_10_01_00], np.uint8),
            "lut": np.array([1, 2, 3, 4], np.float16),
            "shape": np.array([2, 2], np.uint32),
        },
        [Output("w", "FLOAT16", (2, 2))],
    )
    found = constant_weight(weight)
    assert found is not None
    assert found[0].tolist() == [[0, 1], [2, 3]] and found[1].tolist() == [1, 2, 3, 4]


def test_several_luts_are_not_taken_for_one() -> None:
    lut = np.zeros((2, 1, 1, 1, 2, 1), np.float16)
    indices = np.zeros((2, 2, 1, 1), np.uint8)
    weight = Operation("constexpr_lut_to_dense", "w", {"indices": [indices], "lut": [lut]}, {}, [])
    assert constant_weight(weight) is None


def test_state_is_kept_between_calls() -> None:
    state = [Output("s", "", (2,))]
    operations = [
        Operation("read_state", "r", {"input": [Name("s")]}, {}, [Output("r", "FLOAT16", (2,))]),
        Operation("add", "a", {"x": [Name("r")], "y": [Name("x")]}, {}, [Output("y", "", ())]),
        Operation("write_state", "w", {"input": [Name("s")], "data": [Name("y")]}, {}, []),
    ]
    running = Interpreter(Function(state, operations, ["y"]), {"s": torch.zeros(2)})
    running.run({"x": torch.ones(2)})
    assert running.run({"x": torch.ones(2)})["y"].tolist() == [2, 2]
    assert running.state["s"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (_op("rms_norm", x=Name("x")), "the operation rms_norm"),
        (_op("conv", x=Name("x"), weight=np.zeros((1, 6, 3, 3), np.float16)), "not 1x1"),
        (_op("gather", x=Name("x"), indices=ints(0), axis=ints(0), batch_dims=ints(1)), "batched"),
    ],
)
def test_what_is_not_written_here_is_refused(operation: Operation, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _run(operation)
