"""Facts about the graph: a sound model's, and each fault seen when it is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lib.ane.check import run_check
from lib.ane.emulate import Fp16Emulation
from lib.ane.graph import Fact, GraphLog, Status, deployed_shapes, graph_facts
from lib.ane.judge import Kind
from lib.quant.fp16 import MASK_VALUE
from lib.quant.spec import ScaleForm
from tests.ane.tiny import check_spec, snapped_model, token_sequences

NAMES = [
    "finite mask",
    "no log(softmax)",
    "static shapes",
    "rank at most 4",
    "width and height at most 16384",
    "channels at most 65536",
    "head slices",
    "reduce_sum at most 2048",
]


def _log_of(function: Callable[[Tensor], object], x: Tensor) -> GraphLog:
    with torch.no_grad(), Fp16Emulation(nn.Identity()) as emulation:
        function(x)
    return emulation.graph


def _fact(name: str, log: GraphLog) -> Fact:
    facts = graph_facts(snapped_model(), log)
    return next(fact for fact in facts if fact.name.startswith(name))


def test_facts_of_a_sound_model() -> None:
    facts = run_check(snapped_model(), token_sequences(), check_spec()).facts
    assert [fact.name for fact in facts] == NAMES
    status = {fact.name: fact.status for fact in facts}
    # repeated key/value heads: a copy of rank 5 that the exported graph does not have
    assert status.pop("rank at most 4") is Status.NOTE
    assert status.pop("head slices") is Status.NOTE  # counted, not judged
    assert set(status.values()) == {Status.OK}
    found = {fact.name: fact.found for fact in facts}
    assert "mask -10000" in found["finite mask"]
    assert "1 for a vocabulary of 288" in found["head slices"]
    assert "64 terms" in found["reduce_sum at most 2048"]  # the mean in a norm, over 64 channels


@pytest.mark.parametrize(
    ("name", "function", "where"),
    [
        ("no log", lambda x: x.log_softmax(-1), "_log_softmax"),
        ("no log", lambda x: x.softmax(-1).log(), "log"),
        ("no log", lambda x: x.logsumexp(-1), "log"),
        ("static", lambda x: x[x > 0], "index"),
        ("static", lambda x: x.sum().item(), "_local_scalar_dense"),
        ("rank", lambda x: x.view(2, 1, 1, 1, -1) * 2, "mul"),
    ],
)
def test_what_a_deployed_graph_must_not_have(
    name: str, function: Callable[[Tensor], object], where: str
) -> None:
    x = torch.linspace(-1.0, 2.0, 8)
    assert _fact(name, _log_of(lambda x: x[torch.tensor([1, 0])] * 2, x)).status is Status.OK
    fact = _fact(name, _log_of(function, x))
    assert fact.status is Status.BROKEN
    assert where in fact.found


def test_an_infinite_mask_is_broken() -> None:
    mask = torch.tensor([0.0, -float("inf")])
    assert _fact("finite", _log_of(lambda x: (x + mask).softmax(-1), torch.ones(2))).status is (
        Status.BROKEN
    )


def test_scores_as_large_as_the_mask_are_noted() -> None:
    mask = torch.tensor([0.0, MASK_VALUE])
    for size, status in ((100.0, Status.OK), (5100.0, Status.NOTE)):
        with Fp16Emulation(nn.Identity(), [mask]) as emulation:
            shares = (torch.tensor([-size, size]) + mask).softmax(-1)
        assert _fact("finite", emulation.graph).status is status
        assert bool(shares[1] > 0) is (status is Status.NOTE)  # the hidden one shows through


@pytest.mark.parametrize("function", [lambda x: x.sum(), lambda x: x.mean(0), torch.softmax])
def test_long_sums_are_noted(function: Callable[..., Tensor]) -> None:
    call = function if function is not torch.softmax else (lambda x: torch.softmax(x, 0))
    assert _fact("reduce_sum", _log_of(call, torch.ones(2048))).status is Status.OK
    fact = _fact("reduce_sum", _log_of(call, torch.ones(2049)))
    assert fact.status is Status.NOTE
    assert "2049 terms" in fact.found


def test_sizes_of_the_deployed_layout() -> None:
    model = snapped_model()
    shapes = deployed_shapes(model, 24)
    assert shapes["model.layers.0.mlp.down_proj"] == (160, 4, 24)  # rank 4 on the height
    groups = deployed_shapes(snapped_model(scale=ScaleForm.GROUP, group_size=24), 24)
    assert groups["model.layers.0.mlp.down_proj"] == (160, 7, 24)  # as 7 groups are
    assert shapes["attention scores"] == (2, 48, 24)  # 4 heads share 2 keys
    assert shapes["head"] == (288, 1, 24)


GROUP = 16385


@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({}, "width", Status.OK, "with all 2048 positions"),
        ({"max_position_embeddings": 8192}, "width", Status.OK, "16384 in attention scores"),
        # two heads below each other: only the longest context breaks the limit
        ({"max_position_embeddings": 8193}, "width", Status.NOTE, "could be exported with"),
        ({"max_position_embeddings": 40960}, "width", Status.NOTE, "export.prefill_tokens decide"),
        ({"num_attention_heads": 2 * GROUP}, "width", Status.BROKEN, f"{GROUP} in attention"),
        ({"vocab_size": 49152}, "channels", Status.OK, "16384 in head"),
        (
            {"num_attention_heads": 65537, "num_key_value_heads": 65537},
            "channels",
            Status.BROKEN,
            "65537 in attention scores",
        ),
        ({"vocab_size": 49152}, "head", Status.NOTE, "3 for a vocabulary of 49152"),
        ({}, "head", Status.NOTE, "1 for a vocabulary of 288"),
        ({}, "reduce_sum", Status.OK, "the longest that ran"),
        ({"max_position_embeddings": 4096}, "reduce_sum", Status.NOTE, "4096 at most"),
    ],
)
def test_sizes_against_the_limits(
    changes: dict[str, int], name: str, status: Status, words: str
) -> None:
    model = snapped_model()
    for key, value in changes.items():
        setattr(model.config, key, value)
    fact = next(f for f in graph_facts(model, GraphLog()) if f.name.startswith(name))
    assert fact.status is status
    assert words in fact.found


def test_a_model_that_names_no_longest_context() -> None:
    model = snapped_model()
    object.__setattr__(model.config, "max_position_embeddings", None)  # its class forbids it
    facts = graph_facts(model, GraphLog())
    fact = next(f for f in facts if f.name.startswith("width"))
    assert fact.status is Status.NOTE
    assert "no longest context" in fact.found


def test_sizes_do_not_depend_on_the_text() -> None:
    """They are the deployed model's, not those of the sequences that it is checked on."""
    short, long = (
        run_check(snapped_model(), token_sequences(1, length), check_spec(1e9, 0.0)).facts
        for length in (4, 40)
    )
    for name in ("width", "channels", "head slices"):
        of_short, of_long = (
            next(f for f in facts if f.name.startswith(name)) for facts in (short, long)
        )
        assert of_short == of_long


def test_a_broken_fact_fails_the_gate() -> None:
    model = snapped_model()
    model.lm_head.register_forward_hook(lambda module, given, result: result.log_softmax(-1))
    result = run_check(model, token_sequences(), check_spec(max_kl=1e9, min_top1=0.0))
    assert [(f.kind, f.layer) for f in result.failures] == [(Kind.GRAPH, "no log(softmax)")]
