"""Perplexity over the teacher's that a budget buys: whole experiments, several seeds.

    python -m benchmarks.quality                   # the default experiment, three seeds
    python -m benchmarks.quality --budget long     # profile smollm2-long, one seed
    python -m benchmarks.quality --runs 0 --keep DIR   # one of them, in a clone that may be there

A clone of the last commit runs `dvc repro` once per seed. Seeds change what is random in the cache
and in training, not the text: all are measured on the same tokens, more of them than the default
experiment takes, whose few leave an error of several per cent. Later runs start where the seed
makes a difference; seconds are of the stages that ran. What is not measured anew stays in
`results/quality.json` as it is, which is written after every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks import record
from benchmarks.pipeline import ROOT, time_repro
from lib.params.profile import apply_profile

SEEDED = ("cache", "scales", "weights", "finetune", "convert", "finetune_q2")
APART = 100  # between the seeds of two runs; those of the stages of one run differ by less
MODELS = {"q4": "finetune", "q2": "snap"}
EVALUATED = {"perplexity_tokens": 8192, "sequences": 32}
FIGURES = ("perplexity", "kl", "top1", "bits_per_weight", "bits_per_layer_weight")


@dataclass(frozen=True)
class Budget:
    """An experiment, and with how many seeds it is run."""

    profile: str
    seeds: int


BUDGETS = {"short": Budget("smollm2", 3), "long": Budget("smollm2-long", 1)}


def set_run(params: Path, run: int) -> None:
    """Give every stage of :data:`SEEDED` the seed of run ``run``; run 0 has those of the file.

    The text that is measured on is the same in all: see :data:`EVALUATED`.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    document = yaml.load(params.read_text(encoding="utf-8"))
    for section in SEEDED:
        document[section]["seed"] = document[section]["seed"] % APART + APART * run
    document["evaluate"].update(EVALUATED)
    with params.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)


def figures_of(ladder: dict[str, Any]) -> dict[str, float]:
    """What a ladder says of the 4-bit and the 2-bit model."""
    rows = {row["model"]: row for row in ladder["rows"]}
    found = {"teacher_perplexity": rows["teacher"]["perplexity"]}
    for short, model in MODELS.items():
        row = rows[model]
        found[f"{short}_ratio"] = row["perplexity"] / rows["teacher"]["perplexity"]
        found.update({f"{short}_{key}": row[key] for key in FIGURES})
    return found


def summary_of(samples: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Median ratios of each budget, and how far its seeds lie apart."""
    found = {}
    for budget, runs in samples.items():
        for model in MODELS:
            ratios = [run[f"{model}_ratio"] for run in runs]
            found[f"{model}_ratio_{budget}"] = statistics.median(ratios)
            if len(ratios) > 1:
                found[f"{model}_spread_{budget}"] = max(ratios) - min(ratios)
    return found


def run_budget(budget: Budget, folder: Path, runs: list[int]) -> Iterator[dict[str, Any]]:
    """Run an experiment in a clone, once for each number; gives the figures of each."""
    import torch

    if not folder.is_dir():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    apply_profile(budget.profile, folder / "params.yaml", folder / "profiles")
    for run in runs:
        set_run(folder / "params.yaml", run)
        seconds = time_repro(folder)
        ladder = json.loads((folder / "runs/evaluate/ladder.json").read_text(encoding="utf-8"))
        used = {"threads": torch.get_num_threads(), "seconds": seconds}
        yield {"run": run, **used, **figures_of(ladder)}


def main() -> None:
    """Run one budget and write ``results/quality.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", choices=BUDGETS, default="short")
    parser.add_argument("--runs", type=int, nargs="+", help="instead of 2 1 0, or 0 if long")
    parser.add_argument("--keep", type=Path, help="clone here, or go on in the clone that is here")
    options = parser.parse_args()
    on = record.machine()
    budget = BUDGETS[options.budget]
    path = record.RESULTS / "quality.json"
    before = json.loads(path.read_text(encoding="utf-8"))["samples"] if path.exists() else {}
    samples: dict[str, list[dict[str, Any]]] = {**before}
    config = {"evaluate": EVALUATED, **{name: vars(budget) for name, budget in BUDGETS.items()}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary, "clone")
        runs = options.runs or list(reversed(range(budget.seeds)))
        for found in run_budget(budget, folder, runs):
            print(found, flush=True)
            others = [one for one in samples.get(options.budget, []) if one["run"] != found["run"]]
            samples[options.budget] = sorted([*others, found], key=lambda one: one["run"])
            record.save(
                "quality", config=config, samples=samples, summary=summary_of(samples), on=on
            )


if __name__ == "__main__":
    main()
