"""params.yaml as one frozen object: a section per stage, plus what stages share."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lib.params.ane import AneCheck
from lib.params.base import Count, CountOrZero, Section, Seed
from lib.params.data import Cache, Run, Teacher, Tokens
from lib.params.export import Export
from lib.params.methods import Blockwise, Layerwise
from lib.params.prox import Prox, check_prox
from lib.params.recover import Recover
from lib.params.sensitivity import Sensitivity
from lib.params.targets import check_targets
from lib.params.training import (
    Calibrate,
    Convert,
    Distill,
    Finetune,
    FinetuneQ2,
    Quant,
    Scales,
    Weights,
    check_convert,
    check_source,
    check_training,
)


class Snap(Section):
    """How the finished model is stored."""

    form: Literal["lut", "baked"] = "lut"
    """`lut`: packed indices, LUT and scales; `baked`: FP16 weights."""


Task = Literal[
    "piqa",
    "arc_easy",
    "hellaswag",
    "boolq",
    "winogrande",
    "package:piqa",
    "package:openbookqa",
    "package:commonsenseqa",
    "package:boolq",
]


class Evaluate(Section):
    """The ladder over the teacher and every stage."""

    perplexity_window: Annotated[int, Field(ge=2)] = 1024
    """Tokens per window of the perplexity. Default: the reference."""
    perplexity_stride: Count = 512
    """Tokens between windows; at most the window. Each token is scored once."""
    perplexity_tokens: Annotated[int, Field(ge=2)] = 8192
    """At most so many tokens of the test stream."""
    sequences: Count = 64
    """Test sequences for KL and top-1 agreement with the teacher (all, if there are fewer)."""
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Prompts that every rung of the ladder answers."""
    new_tokens: Count = 48
    """Tokens generated per prompt."""
    tasks: Annotated[tuple[Task, ...], Field(strict=False)] = ()
    """Multiple-choice tasks whose zero-shot accuracy every rung is measured on; they need the extra
    `tasks`. `package:` sets come out of a PyPI package, the others are lm-eval's, from the hub."""
    task_items: CountOrZero = 200
    """At most so many items of each task, drawn with `seed`; 0 = all."""
    seed: Seed = 0
    """Seed of the sampling: of sequences, items of tasks, and generated text."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[Task, ...]) -> tuple[Task, ...]:
        if len(set(value)) != len(value):
            raise ValueError("must not repeat a task")
        return value

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.perplexity_stride > self.perplexity_window:
            raise ValueError(
                f"evaluate.perplexity_stride = {self.perplexity_stride}: must be at most "
                f"evaluate.perplexity_window = {self.perplexity_window}, or tokens are skipped"
            )
        return self


class Params(Section):
    """The whole of params.yaml."""

    teacher: Teacher
    tokens: Tokens
    calibrate: Calibrate
    quant: Quant
    cache: Cache
    distill: Distill
    sensitivity: Sensitivity
    layerwise: Layerwise
    blockwise: Blockwise
    prox: Prox
    scales: Scales
    weights: Weights
    finetune: Finetune
    convert: Convert
    finetune_q2: FinetuneQ2
    snap: Snap
    recover: Recover
    ane_check: AneCheck
    export: Export
    evaluate: Evaluate
    run: Run = Run()

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        known = self.cache.temperatures
        if self.distill.target == "tail" and self.distill.temperature not in known:
            raise ValueError(
                f"distill.temperature = {self.distill.temperature}: distill.target is tail, which "
                "needs the log-sum-exp at this temperature, and cache.temperatures is "
                f"{list(known)}; add it there or set distill.target to candidates"
            )
        check_convert(self.quant, self.convert)
        if self.recover.steps and self.snap.form == "baked":
            raise ValueError(
                f"recover.steps = {self.recover.steps}: adapters stand beside quantized layers, "
                "and snap.form is baked, which has none; set it to 0 or snap.form to lut"
            )
        for name, method in (("scales", self.scales.method), ("weights", self.weights.method)):
            if self.run.processes > 1 and method != "e2e":
                raise ValueError(
                    f"run.processes = {self.run.processes}: {name}.method is {method}, which "
                    "trains in one process; set it to 1, or the method to e2e"
                )
        check_source(self.distill, {"scales": self.scales, "weights": self.weights})
        check_source(self.distill, {"finetune": self.finetune, "finetune_q2": self.finetune_q2})
        names = ("scales", "weights", "finetune", "finetune_q2", "recover")
        check_targets(self.cache, self.distill, {name: getattr(self, name) for name in names})
        check_prox(self.weights, self.prox, self.quant, self.run)
        for name in ("scales", "weights", "finetune"):
            check_training(
                name, getattr(self, name), self.quant.codebook, attention=self.quant.attention
            )
        check_training(
            "finetune_q2", self.finetune_q2, self.convert.codebook, attention=self.quant.attention
        )
        return self
