"""Sections on where the results come from: parameters, fingerprints."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from lib.report.experiment import Experiment
from lib.report.parts import Columns, Fold, Note, Pair, Part, Table, absent
from lib.report.values import MISSING, flatten, lookup, shown

AS_NOW = "as in params.yaml"
OTHERS = "with other parameters"
_DIGITS = 12  # of a checksum that are shown; the rest shows when it is pointed at


def parameters(pair: Pair) -> list[Part]:
    """params.yaml by section; for two experiments what differs, first."""
    parts: list[Part] = []
    if not any(one.params for one in pair.both):
        return [absent("No params.yaml.")]
    if pair.other is not None:
        parts.append(_differences(pair.this, pair.other))
    tables: list[Part] = []
    for name, values in pair.this.params.items():
        flat = flatten(values) if isinstance(values, dict) else {"": values}
        rows = [[key or name, _written(value)] for key, value in flat.items()]
        table = Table(caption=name, head=["key", "value"], rows=rows, words=True)
        keys = "1 key" if len(rows) == 1 else f"{len(rows)} keys"
        tables.append(Fold(summary=f"{name} · {keys}", parts=[table]))
    return [*parts, Columns(parts=tables)]


def _written(value: Any) -> Markup:
    """A parameter as params.yaml has it."""
    return MISSING if value is None else Markup("<code>{}</code>").format(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[]" if not value else ", ".join(_plain(item) for item in value)
    if isinstance(value, dict):
        return " ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return str(value)


def differing(this: Experiment, other: Experiment) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, of the parameters that are not the same."""
    ours, theirs = flatten(this.params), flatten(other.params)
    return {
        key: (ours.get(key), theirs.get(key))
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs)
    }


def _differences(this: Experiment, other: Experiment) -> Part:
    found = differing(this, other)
    if not found:
        return Note(lines=["All parameters are the same."])
    rows = [[key, _written(new), _written(old)] for key, (new, old) in found.items()]
    return Table(
        caption=f"{len(found)} parameters differ" if len(found) > 1 else "One parameter differs",
        head=["parameter", this.name, other.name],
        rows=rows,
        words=True,
    )


def stage_state(one: Experiment, stage: str) -> str:
    """Whether a stage ran, and with the parameters that params.yaml has now."""
    if stage not in one.lock:
        return "not run"
    recorded = (one.lock[stage].get("params") or {}).get("params.yaml") or {}
    same = all(lookup(one.params, key) == value for key, value in recorded.items())
    return AS_NOW if same else OTHERS


def mixture(pair: Pair) -> list[Part]:
    """A warning where results on the page do not belong together, by what dvc.lock recorded."""
    parts: list[Part] = []
    for one in pair.both:
        lines = []
        made = {out["path"]: out.get("md5") for s in one.lock.values() for out in s.get("outs", ())}
        late = [stage for stage in one.stages if stage_state(one, stage) == OTHERS]
        if late:
            lines.append(f"{', '.join(late)} ran {OTHERS} than params.yaml has")
        for stage in one.stages:
            deps = one.lock.get(stage, {}).get("deps", ())
            others = [d["path"] for d in deps if made.get(d["path"], d["md5"]) != d["md5"]]
            if others:
                lines.append(f"{stage} read another {', '.join(others)} than dvc.lock has now")
        if lines:
            name = f", {one.name}" if pair.other else ""
            title = f"Not of one piece{name}: `dvc repro` brings it up to date"
            parts.append(Note(title=title, lines=lines, tone="warn"))
    return parts


def fingerprints(pair: Pair) -> list[Part]:
    """What dvc.lock and the checkpoints say of what was made from what."""
    parts: list[Part] = []
    for one in pair.both:
        name = f", {one.name}" if pair.other else ""
        if one.checkpoints:
            parts.append(_checkpoints(one, name))
        if not one.lock:
            parts.append(absent(f"No dvc.lock{name}."))
            continue
        idle = [s for s in one.stages if s not in one.lock]
        if idle:
            parts.append(absent(f"dvc.lock{name} has no {', '.join(idle)}."))
        table = _locked(one, name)
        parts.append(Fold(summary=f"{len(table.rows)} outputs{name}", parts=[table]))
    return parts


def _locked(one: Experiment, name: str) -> Table:
    rows: list[list[str | Markup]] = []
    for stage in one.stages:
        for out in one.lock.get(stage, {}).get("outs") or ():
            digest = str(out.get("md5", ""))
            rows.append(
                [
                    out["path"],
                    stage,
                    _digest(digest),
                    shown(out.get("size")),
                    stage_state(one, stage),
                ]
            )
    return Table(
        caption=f"Outputs, as dvc.lock has them{name}",
        head=["output", "stage", "MD5", "bytes", "ran"],
        rows=rows,
    )


def _digest(text: str) -> Markup:
    if not text:
        return MISSING
    return Markup('<code title="{}">{}</code>').format(text, text[:_DIGITS])


def _checkpoints(one: Experiment, name: str) -> Table:
    known = dict.fromkeys(key for values in one.checkpoints.values() for key in values)
    columns = [key for key in known if key != "stage"]
    rows = [
        [stage, *(_digest(str(values.get(key) or "")) for key in columns)]
        for stage, values in one.checkpoints.items()
    ]
    return Table(
        caption=f"Fingerprints that the checkpoints carry{name}",
        head=["checkpoint of", *columns],
        rows=rows,
    )
