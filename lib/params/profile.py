"""Profiles: whole recipes, merged into params.yaml by `lutqat profile NAME`."""

from __future__ import annotations

import difflib
import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.representer import RoundTripRepresenter

from lib.base.errors import ParamsError
from lib.base.files import write_text
from lib.params.load import PARAMS_FILE, parse_params, read_yaml

PROFILES_FOLDER = Path("profiles")
_WIDTH = 100


def available_profiles(folder: Path = PROFILES_FOLDER) -> list[str]:
    """Names that :func:`apply_profile` takes, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def apply_profile(
    name: str, params_file: Path = PARAMS_FILE, folder: Path = PROFILES_FOLDER
) -> list[str]:
    """Merge ``folder/name.yaml`` into ``params_file`` and return the dotted keys that changed.

    Sections merge key by key; lists and single values replace. Comments and the order of the keys
    of ``params_file`` stay. Nothing is written unless the result is valid.

    Raises:
        ParamsError: no such profile (the message lists them), or the result is not valid.
    """
    names = available_profiles(folder)
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ParamsError(f"no profile {name!r}; {hint}there are {', '.join(names) or 'none'}")
    yaml = _round_trip_yaml()
    document = _load_with_comments(yaml, params_file)
    changed = merge(document, _load_with_comments(yaml, folder / f"{name}.yaml"))
    text = io.StringIO()
    yaml.dump(document, text)
    merged = YAML(typ="safe", pure=True).load(text.getvalue())
    parse_params(merged, f"{params_file.name} with profile {name}")
    if changed:
        write_text(params_file, text.getvalue())
    return changed


def merge(target: CommentedMap, updates: dict[str, Any], prefix: str = "") -> list[str]:
    """Set the values of ``updates`` in ``target``, mappings recursively.

    Returns the dotted keys whose value is another one now, in the order of ``updates``.
    """
    changed: list[str] = []
    for key, value in updates.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            changed += merge(target[key], value, f"{prefix}{key}.")
        elif key not in target or not _same(target[key], value):
            if isinstance(target.get(key), list) and isinstance(value, list) and value:
                target[key][:] = value  # in place: the comment behind the key stays
            else:
                if value == []:
                    target.ca.items.pop(key, None)  # it would come between the key and its []
                target[key] = value
            changed.append(f"{prefix}{key}")
    return changed


def _same(one: Any, other: Any) -> bool:
    """Equal values; 1 and 1.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, not as nothing."""


_Representer.add_representer(
    type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _load_with_comments(yaml: YAML, path: Path) -> CommentedMap:
    """The document with its comments and the spelling of its numbers."""
    if not isinstance(read_yaml(path), dict):  # which raises the one-line error of a broken file
        raise ParamsError(f"{path} must hold sections such as 'quant:'; restore it from git")
    return yaml.load(path.read_text(encoding="utf-8"))


def _round_trip_yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = _WIDTH
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml
