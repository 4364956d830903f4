"""One experiment: what its stages left, as plain values.

Everything may be missing, because a stage did not run; that is no error and shows as None or empty.
A file that cannot be read is missing too, and is named in `faults`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lib.base.errors import InputError
from lib.report.source import Source

REMEDY = "`dvc repro` runs the pipeline"


@dataclass(kw_only=True)
class Experiment:
    """What the report knows of one experiment.

    Attributes:
        stages: names in the order of dvc.yaml. outputs: every path that they write.
        params: params.yaml. lock: dvc.lock's entry of each stage.
        metrics: of each stage that has some. logs: rows of each training stage's log.csv.
        checkpoints: identity of each stage's checkpoint (fingerprints; no layers).
        files: the other reports by path, as they are in JSON.
        faults: files that cannot be read, and why.
    """

    name: str
    commit: str
    stages: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    lock: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its name, for a revision with the commit that it stands for."""
        new = self.commit and not self.name.startswith(self.commit)
        return f"{self.name} ({self.commit})" if new else self.name


LADDER = "runs/evaluate/ladder.json"
SAMPLES = "runs/evaluate/samples.json"
SCORES = "runs/sensitivity/scores.json"
GRID = "runs/weights/grid.json"
ANE = "runs/ane_check/report.json"
EXPORT = "runs/export/report.json"


def read_experiment(source: Source) -> Experiment:
    """Everything that ``source`` holds.

    Raises:
        InputError: it has no pipeline, or nothing of it has run.
    """
    found = Experiment(name=source.name, commit=source.commit)
    pipeline = _read(found, source, "dvc.yaml", _yaml)
    if not isinstance(pipeline, dict) or not isinstance(pipeline.get("stages"), dict):
        remedy = (
            "name a revision that has one"
            if source.commit
            else "run from the root of the repository"
        )
        raise InputError(f"{source.name}: no pipeline (dvc.yaml) to report on; {remedy}")
    found.stages = [str(stage) for stage in pipeline["stages"]]
    found.outputs = list(_outputs(pipeline["stages"]))
    found.params = _read(found, source, "params.yaml", _yaml_object) or {}
    lock = _read(found, source, "dvc.lock", _yaml_object) or {}
    found.lock = lock["stages"] if isinstance(lock.get("stages"), dict) else {}
    for stage in found.stages:
        for folder in (f"data/{stage}", f"runs/{stage}"):
            values = _read(found, source, f"{folder}/metrics.json", _object) or {}
            if isinstance(values.get(stage), dict):
                found.metrics[stage] = values[stage]
        rows = _read(found, source, f"runs/{stage}/log.csv", _rows)
        if rows:
            found.logs[stage] = rows
        config = _read(found, source, f"runs/{stage}/model/config.json", _object)
        if config and isinstance(config.get("info"), dict):
            identity = {key: v for key, v in config["info"].items() if isinstance(v, str)}
            found.checkpoints[stage] = {**identity, "fingerprint": config.get("fingerprint")}
    for path in (LADDER, SAMPLES, SCORES, GRID, ANE, EXPORT):
        content = _read(found, source, path, _object)
        if content:
            found.files[path] = content
    if not found.metrics and not found.logs and not found.files:
        raise InputError(f"{source.name}: no stage has results to report on; {REMEDY}")
    return found


def _outputs(stages: dict[str, Any]) -> Iterable[str]:
    """Every path that the stages write; an entry is a path, or a path with options."""
    for stage in stages.values():
        for kind in ("outs", "metrics", "plots"):
            entries = stage.get(kind) if isinstance(stage, dict) else None
            for entry in entries if isinstance(entries, list) else ():
                yield from map(str, entry if isinstance(entry, dict) else (entry,))


def _read(found: Experiment, source: Source, path: str, parse: Callable[[str], Any]) -> Any:
    """A file's content; None where it is missing or cannot be read, which is noted."""
    content = source.read(path)
    if content is None:
        return None
    try:
        return parse(content.decode("utf-8"))
    except (ValueError, YAMLError, csv.Error, RecursionError) as error:
        found.faults.append(f"{path} cannot be read ({' '.join(str(error).split())[:200]})")
        return None


def _yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _yaml_object(text: str) -> dict[str, Any]:
    return _checked_object(_yaml(text))


def _object(text: str) -> dict[str, Any]:
    return _checked_object(json.loads(text))


def _checked_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it holds no names with values")
    return value


def _rows(text: str) -> list[dict[str, float]]:
    """The rows of a log, without empty cells and what is not finite."""
    rows: list[dict[str, float]] = []
    for row in csv.DictReader(io.StringIO(text)):
        if None in row or None in row.values():
            raise ValueError(f"row {len(rows) + 1} has not as many cells as there are columns")
        values = {key: float(cell) for key, cell in row.items() if cell}
        if "step" not in values:
            raise ValueError(f"row {len(rows) + 1} has no step")
        rows.append({key: value for key, value in values.items() if math.isfinite(value)})
    return rows
