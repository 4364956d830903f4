"""`lutqat profile`."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer


def profile(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Profile to merge into params.yaml; none: list them.", show_default=False
        ),
    ] = None,
) -> None:
    """Choose a recipe: merge profiles/NAME.yaml into params.yaml.

    Comments of params.yaml stay, and nothing is written unless the result is valid. `dvc repro`
    then reruns what depends on the changed keys.

    Example: lutqat profile smollm2-long
    """
    from lib.params.profile import PROFILES_FOLDER, apply_profile, available_profiles

    if name is not None:
        changed = apply_profile(name)
        for key in changed:
            print(key)
        what = f"{len(changed)} keys of params.yaml changed" if changed else "nothing to change"
        print(f"{what}; `dvc repro` runs the pipeline")
        return
    names = available_profiles()
    width = max(map(len, names), default=0)
    for known in names:
        text = (PROFILES_FOLDER / f"{known}.yaml").read_text(encoding="utf-8")
        print(f"{known:<{width}}  {_first_sentence(text)}".rstrip())
    if not names:
        print("no profiles here; run from the root of the repository")


def _first_sentence(text: str) -> str:
    """The first sentence of the comment that a YAML file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in lines)
    return words.split(". ", 1)[0].rstrip(".")
