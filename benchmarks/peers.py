"""This project's recipes beside other quantizers: equal bits, equal text, equal time.

    python -m benchmarks.peers

Needs data/ of `dvc repro` (teacher, tokens, cache); the other quantizers are an extra:
`pip install --no-deps -r requirements-peers.txt`. A method whose package is not installed, that
fails or that hangs is a row that says so. Every method runs in a process of its own; its dense
weights are put into the teacher, and all are measured by the code of the stage `evaluate`, on its
test text.

The teacher was itself dequantized from 4 bits in asymmetric groups of 32: at 4 bits such groups
would restore it, so they have 64 here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import quantizers, record, training
from benchmarks.apart import apart
from benchmarks.budget import Made, Work
from benchmarks.peer_report import Sample, draw, table
from benchmarks.storage import FP16
from lib.base.errors import InputError, MismatchError
from lib.base.figures import write_svg
from lib.base.files import write_text
from lib.base.numbers import finite
from lib.params.schema import Evaluate

PACKAGES = ("hqq", "auto-round", "torchao", "coremltools")
Q2_RATES = {"weight": 4e-4, "scale_direction": 2e-4, "scale_magnitude": 0.02}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: what makes its weights, with which settings, and the package that must be there."""

    make: Callable[..., Made]
    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    package: str | None = None


def _own(about: str, rates: dict[str, float], **quant: Any) -> Method:
    """A recipe of this project: weights and scales trained together from a refitted start."""
    start = {"init": "importance+gptq", "refit_steps": 4}
    quant = {**start, "scale": "directional", "range": 0.65, **quant}
    settings = {"quant": quant, "rates": rates, "sequences": 64}
    return Method(make=training.at_once, about=about, settings=settings)


def _int(bits: int, group_size: int) -> dict[str, int]:
    return {"bits": bits, "group_size": group_size}


def _kmeans(bits: int, outputs: int, about: str) -> Method:
    return Method(
        make=quantizers.kmeans,
        about=about,
        settings={"bits": bits, "outputs": outputs},
        package="coremltools",
    )


def _hqq(bits: int) -> Method:
    return Method(make=quantizers.hqq, about="groups of 64", settings=_int(bits, 64), package="hqq")


def _autoround(bits: int, group_size: int) -> Method:
    return Method(
        make=quantizers.autoround,
        about=f"symmetric groups of {group_size}",
        settings=_int(bits, group_size),
        package="auto-round",
    )


def _torchao(bits: int, symmetric: bool, rate: float) -> Method:
    return Method(
        make=quantizers.torchao,
        about=f"QAT, {'symmetric' if symmetric else 'asymmetric'} groups of 64",
        settings={**_int(bits, 64), "symmetric": symmetric, "rate": rate},
        package="torchao",
    )


def _rtn(bits: int, group_size: int) -> Method:
    about = f"round to nearest, groups of {group_size}"
    return Method(make=quantizers.rtn, about=about, settings=_int(bits, group_size))


METHODS = {
    "rtn-4": _rtn(4, 64),
    "kmeans-4": _kmeans(4, 2, "coremltools, a table per 2 outputs"),
    "hqq-4": _hqq(4),
    "autoround-4": _autoround(4, 64),
    "torchao-4": _torchao(4, True, 5e-5),
    "lutqat-4": Method(make=training.staged, about="the default recipe's Q4A4"),
    "rtn-3": _rtn(3, 64),
    "kmeans-3": _kmeans(3, 1, "coremltools, a table per output"),
    "hqq-3": _hqq(3),
    "autoround-3": _autoround(3, 64),
    "lutqat-3": _own("3 bits everywhere, rank 8", Q2_RATES, lut_size=8, rank=8),
    "lutqat-q2a4": _own(
        "MLPs at 2 bits, attention at 4",
        Q2_RATES,
        lut_size=4,
        attention_lut_size=16,
        rank=32,
        attention_rank=8,
    ),
    "rtn-2": _rtn(2, 32),
    "kmeans-2": _kmeans(2, 1, "coremltools, a table per output"),
    "hqq-2": _hqq(2),
    "autoround-2": _autoround(2, 32),
    "torchao-2": _torchao(2, False, 4e-4),
    "lutqat-2": _own("2 bits everywhere, rank 12", Q2_RATES, lut_size=4, rank=12),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every method is given and measured by."""

    data: Path
    params: Path
    budget: float
    threads: int
    evaluate: Evaluate
    limit: float = 3600.0
    """Seconds after which a method that has said nothing is ended."""

    def to_json(self) -> dict[str, Any]:
        """What figures must have in common to stand in one table."""
        keys = ("perplexity_window", "perplexity_stride", "perplexity_tokens", "sequences", "seed")
        return {
            "budget": self.budget,
            "threads": self.threads,
            "evaluate": {key: getattr(self.evaluate, key) for key in keys},
        }


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_apart(train: np.ndarray, test: np.ndarray) -> None:
    """Refuse test rows ``[S, L]`` that are training rows ``[N, L]`` too.

    Raises:
        InputError: some are; their number is given.
    """
    known = {row.tobytes() for row in train}
    shared = sum(row.tobytes() in known for row in test)
    if shared:
        raise InputError(
            f"{shared} of {len(test)} test rows are training rows too; rerun the tokens stage"
        )


def measure(setting: Setting, made: Made | None) -> dict[str, Any]:
    """Perplexity, KL and top-1 of the teacher with these weights (None: with its own)."""
    import torch

    from lib.evaluate.agreement import TeacherTarget
    from lib.evaluate.ladder import HeldOut
    from lib.evaluate.perplexity import perplexity
    from lib.model.load import load_causal_lm
    from lib.text.sequences import TokenSet, read_stream

    tokens = setting.data / "tokens"
    train, test = TokenSet(tokens / "train"), TokenSet(tokens / "test")
    check_apart(train.input_ids, test.input_ids)
    stream = read_stream(tokens / "test")
    text = HeldOut(stream=stream, input_ids=test.input_ids, lengths=test.lengths)
    text = text.limited(setting.evaluate)
    model = load_causal_lm(setting.data / "teacher")
    target = TeacherTarget(model, text.input_ids, text.lengths)
    if made is not None:
        layers = quantizers.linear_layers(model)
        if layers.keys() != made.weights.keys():
            raise MismatchError(f"{len(made.weights)} weights for {len(layers)} layers")
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(made.weights[name])
    agreement = target.compare(model)
    window, stride = setting.evaluate.perplexity_window, setting.evaluate.perplexity_stride
    return {
        "perplexity": finite(perplexity(model, text.stream, window, stride)),
        "kl": finite(agreement.kl),
        "top1": agreement.top1,
        "scored_tokens": len(text.stream) - 1,
        "scored_positions": int((text.lengths.astype(np.int64) - 1).clip(0).sum()),
    }


def produce(method: Method | None, setting: Setting) -> dict[str, Any]:
    """Run a method and measure it, in this process; None is the teacher as it is."""
    from lib.base.device import set_threads
    from lib.evaluate.memory import peak_megabytes, reset_peak

    set_threads(setting.threads)
    if method is None:
        return {"bits": FP16, **measure(setting, None)}
    work = Work(data=setting.data, params=setting.params, seconds=setting.budget)
    reset_peak()
    made = method.make(work, **method.settings)
    seconds, peak = work.clock.seconds, peak_megabytes() * 1e6
    figures = measure(setting, made)
    return {"bits": made.bits, **figures, "seconds": seconds, "peak_bytes": peak, "run": made.run}


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:200]}".replace("|", "/")


def _row(method: Method | None, setting: Setting) -> Sample:
    try:
        return {"status": "ok", **produce(method, setting)}
    except (Exception, SystemExit) as error:  # whatever a peer does is its row
        return {"status": _in_a_line(error)}


def sample(method: Method | None, setting: Setting) -> Sample:
    """A method's row: in a process of its own, or why there are no figures."""
    about = "as it is" if method is None else method.about
    if method is not None and method.package and version_of(method.package) is None:
        return {"status": "not installed", "about": about}
    try:
        found = apart(_row, method, setting, limit=setting.limit)
    except (TimeoutError, ChildProcessError) as error:
        found = {"status": f"failed: {error}"}
    return {"status": found.pop("status"), "about": about, **found}


def kept(path: Path, setting: Setting, rerun: list[str]) -> dict[str, Sample]:
    """Samples of an earlier run that stay beside those of ``rerun``.

    Raises:
        InputError: they were measured otherwise.
    """
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in setting.to_json().items():
        if before["config"].get(key) != value:
            raise InputError(
                f"{path} has figures for {key} {before['config'].get(key)}, and {value} is asked "
                "for; run without --only"
            )
    return {name: found for name, found in before["samples"].items() if name not in rerun}


def write(samples: dict[str, Sample], setting: Setting, on: dict[str, Any]) -> None:
    """``results/peers.json``, ``.md`` and ``.svg``, the methods in their order."""
    order = [name for name in ("teacher", *METHODS) if name in samples]
    samples = {name: samples[name] for name in order}
    summary = {
        f"{name}_{key}": found[key]
        for name, found in samples.items()
        for key in ("bits", "perplexity", "kl")
        if found["status"] == "ok" and found[key] is not None
    }
    versions = {package: version_of(package) or "not installed" for package in PACKAGES}
    config = setting.to_json()
    figures = {"config": config, "samples": samples, "summary": summary}
    with contextlib.redirect_stdout(io.StringIO()):  # it is written after every method
        record.save("peers", **figures, on=on, versions=versions)
    write_text(record.RESULTS / "peers.md", table(samples, config, versions))
    write_svg(record.RESULTS / "peers.svg", draw(samples))


def main() -> None:
    """Run the methods one after the other; results are written after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=180.0, help="seconds, of what trains")
    parser.add_argument("--only", nargs="+", choices=["teacher", *METHODS], metavar="NAME")
    parser.add_argument("--limit", type=float, default=Setting.limit, help="seconds, of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("data"), help="of the pipeline")
    parser.add_argument("--perplexity-tokens", type=int, help="instead of params.yaml's")
    parser.add_argument("--sequences", type=int, help="instead of params.yaml's")
    options = parser.parse_args()
    from lib.params.load import PARAMS_FILE, load_params

    asked = {"perplexity_tokens": options.perplexity_tokens, "sequences": options.sequences}
    changes = {key: value for key, value in asked.items() if value is not None}
    evaluate = load_params().evaluate
    evaluate = Evaluate(**{**evaluate.model_dump(), **changes})
    setting = Setting(
        data=options.data,
        params=PARAMS_FILE,
        budget=options.budget,
        threads=options.threads,
        evaluate=evaluate,
        limit=options.limit,
    )
    on = record.machine()
    rerun = options.only or ["teacher", *METHODS]
    samples = kept(record.RESULTS / "peers.json", setting, rerun) if options.only else {}
    if "teacher" not in samples:
        samples["teacher"] = sample(None, setting)
        if samples["teacher"]["status"] != "ok":
            raise SystemExit(f"the teacher cannot be measured: {samples['teacher']['status']}")
    for name in (name for name in METHODS if name in rerun):
        samples[name] = sample(METHODS[name], setting)
        print(f"{name}: {json.dumps(samples[name])}", flush=True)
        write(samples, setting, on)


if __name__ == "__main__":
    main()
