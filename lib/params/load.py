"""Reading params.yaml: validated as a whole, handed to a stage key by key.

A stage sees only the keys that its entry in dvc.yaml declares. Reading any other raises, because
DVC would not rerun the stage when that key changes, and its result would go stale in silence.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from lib.base.errors import LutqatError, ParamsError
from lib.base.files import fingerprint
from lib.params.schema import Params

PARAMS_FILE = Path("params.yaml")
DVC_FILE = Path("dvc.yaml")
ALWAYS_READABLE = ("run",)

_LONGEST_VALUE = 80  # characters of a refused value that are shown


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML 1.2 file (so 3e-05 is a number).

    Raises:
        ParamsError: the file is missing, is not YAML, or repeats a key.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path} does not exist here; run from the root of the repository"
        ) from None
    except OSError:
        raise
    except Exception as error:  # values that YAML's own types refuse raise whatever Python raises
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or _problem(error)
        raise ParamsError(
            f"{path}{where} is not valid YAML: {problem}; correct that line"
        ) from None


def _problem(error: Exception) -> str:
    """What is wrong with a file, where the parser does not say it in words."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    said = " ".join(str(error).split())
    return f"a value that cannot be read ({said or type(error).__name__})"


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate params.yaml.

    Raises:
        ParamsError: one line with the first offending key, its value, what is allowed and how
            to put it right.
    """
    return parse_params(read_yaml(path), path.name)


def parse_params(values: Any, file_name: str = PARAMS_FILE.name) -> Params:
    """Validate plain values as :func:`load_params` does; ``file_name`` is for the message."""
    if not isinstance(values, dict):
        raise ParamsError(f"{file_name} must hold sections such as 'quant:'; restore it from git")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        more = f" ({len(errors) - 1} more to correct)" if len(errors) > 1 else ""
        raise ParamsError(f"{file_name}: {_explain(dict(errors[0]), file_name)}{more}") from None


def known_keys(model: type[BaseModel] = Params, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, sections included; a list's elements have no index."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def _explain(error: dict[str, Any], file_name: str) -> str:
    """One line for one pydantic error."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _explain_unknown(error["loc"], key)
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    if error["type"] == "value_error" and isinstance(error["input"], dict | BaseModel):
        # A rule between several keys names them itself, from the root or from its section.
        section = key.split(".", 1)[0]
        return message if not key or message.startswith(f"{section}.") else f"{key}.{message}"
    allowed = message.replace("Input should be", "must be").replace("valid tuple", "valid list")
    if error["type"] == "model_type":
        allowed = "must be a section with keys of its own"
    return f"{key} = {_shown(error['input'])}: {allowed}; correct it in {file_name}"


def _explain_unknown(location: tuple[str | int, ...], key: str) -> str:
    """An unknown key: the nearest known one, or everything that may stand in its place."""
    path = [str(part) for part in location if not isinstance(part, int)]
    nearest = difflib.get_close_matches(".".join(path), known_keys(), n=1, cutoff=0.75)
    if nearest:
        return f"{key} is not a known key; did you mean {nearest[0]}?"
    depth = len(path)
    siblings = [k.split(".")[-1] for k in known_keys() if k.split(".")[:-1] == path[:-1]]
    where = ".".join(path[: depth - 1]) or "the top level"
    return f"{key} is not a known key; {where} may have {', '.join(siblings)}; remove or rename it"


def _shown(value: Any) -> str:
    """A refused value as YAML users write it, shortened."""
    text = ""
    try:
        for piece in json.JSONEncoder(default=str).iterencode(value):  # may have no end
            text += piece
            if len(text) > _LONGEST_VALUE:
                return text[: _LONGEST_VALUE - 3] + "..."
    except (TypeError, ValueError, RecursionError):  # keys or numbers that JSON does not know
        return text + "..."
    return text


class _View:
    """Attribute access to a section, limited to the declared keys below it."""

    def __init__(self, model: BaseModel, prefix: str, stage: str, declared: frozenset[str]) -> None:
        self._model = model
        self._prefix = prefix
        self._stage = stage
        self._declared = declared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in type(self._model).model_fields:
            raise AttributeError(f"params have no key {self._prefix}{name}")
        key = self._prefix + name
        value = getattr(self._model, name)
        if key in self._declared or key in ALWAYS_READABLE:
            return value
        if any(other.startswith(f"{key}.") for other in self._declared):
            return _View(value, f"{key}.", self._stage, self._declared)
        raise LutqatError(
            f"stage {self._stage} reads {key}, which its params in dvc.yaml do not list; "
            f"add {key} to stages.{self._stage}.params, or changing it would rerun nothing"
        )


class StageParams(_View):
    """The part of params.yaml that one stage declares in dvc.yaml, and `run`.

    `params.quant` is the pydantic section itself where the stage declares all of it; otherwise
    only the declared leaves can be read, and any other read raises :class:`LutqatError`.
    """

    def __init__(self, params: Params, stage: str, declared: list[str]) -> None:
        super().__init__(params, "", stage, frozenset(declared))

    def declared_values(self) -> dict[str, Any]:
        """Declared key -> plain JSON value, defaults filled in; without `run`."""
        whole = self._model.model_dump(mode="json")
        values = {}
        for key in sorted(self._declared):
            value = whole
            for part in key.split("."):
                value = value[part]
            values[key] = value
        return values

    def declared_fingerprint(self) -> str:
        """Fingerprint of :meth:`declared_values`: equal where DVC sees no change of params."""
        return fingerprint(self.declared_values())


def declared_keys(stage: str, dvc_file: Path = DVC_FILE) -> list[str]:
    """The params keys that ``stage`` lists in dvc.yaml.

    Raises:
        ParamsError: dvc.yaml has no such stage, or lists a key that the schema does not have.
    """
    stages = (read_yaml(dvc_file) or {}).get("stages", {})
    if stage not in stages:
        raise ParamsError(f"{dvc_file} has no stage {stage}; it has {', '.join(stages)}")
    declared = stages[stage].get("params", [])
    known = known_keys()
    for key in declared:
        if key not in known:
            raise ParamsError(
                f"{dvc_file}: stages.{stage}.params lists {key!r}, which is not a key of "
                f"{PARAMS_FILE}; correct or remove it"
            )
    return list(declared)


def stage_params(stage: str) -> StageParams:
    """Validate ./params.yaml whole and return what ``stage`` declares of it in ./dvc.yaml.

    Raises:
        ParamsError: params.yaml is not valid, or dvc.yaml does not know the stage.
    """
    return StageParams(load_params(), stage, declared_keys(stage))
