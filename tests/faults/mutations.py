"""Ways in which a folder of files can be wrong, drawn at random."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, Path], str]
"""Changes one file (or exchanges two) and says what it did."""


def flip_bits(chance: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = [chance.randrange(len(content)) for _ in range(chance.choice((1, 1, 1, 2, 8)))]
    for place in places:
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"bits flipped at {places}"


def flip_in_header(chance: random.Random, path: Path) -> str:
    """Where formats keep lengths and offsets: at the ends."""
    content = bytearray(path.read_bytes())
    reach = min(len(content), 600)
    place = chance.choice((chance.randrange(reach), len(content) - 1 - chance.randrange(reach)))
    content[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
    path.write_bytes(content)
    return f"byte {place} set to {content[place]}"


def truncate(chance: random.Random, path: Path) -> str:
    content = path.read_bytes()
    size = chance.choice((0, 1, len(content) - 1, chance.randrange(len(content))))
    path.write_bytes(content[:size])
    return f"cut to {size} bytes"


def extend(chance: random.Random, path: Path) -> str:
    more = chance.randbytes(chance.choice((1, 8, 4096)))
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes more"


def blank(chance: random.Random, path: Path) -> str:
    """A block that was never written, as after a crash."""
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.choice((1, 64, 4096)))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return f"zeros from {start} to {stop}"


def delete(chance: random.Random, path: Path) -> str:
    path.unlink()
    return "deleted"


def make_folder(chance: random.Random, path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "a folder instead"


def exchange(chance: random.Random, path: Path) -> str:
    """The content of another file of the folder."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    other = chance.choice(others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"exchanged with {other.name}"


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from nodes(inner)


ODD: tuple[Any, ...] = (
    *(None, True, "", "x", [], {}, 0, -1, 2**31, 2**63, 10**30, 0.5),
    *(float("nan"), float("inf"), "../../etc/passwd", [[[]]], {"a": {}}),
)


def edit_json(chance: random.Random, path: Path) -> str:
    """One value replaced, removed, renamed or doubled; numbers changed a little too."""
    values = json.loads(path.read_text())
    owner, key = chance.choice(list(nodes(values)))
    how = chance.choice(("replace", "remove", "nudge", "add"))
    if how == "nudge" and isinstance(owner[key], int | float):
        owner[key] += chance.choice((1, -1))
    elif how == "remove":
        del owner[key]
    elif how == "add" and isinstance(owner, dict):
        owner["unknown"] = chance.choice(ODD)
    else:
        owner[key] = chance.choice(ODD)
    path.write_text(json.dumps(values, indent=2) + "\n")
    return f"{how} at {key!r}"


def rewrite_json(chance: random.Random, path: Path) -> str:
    """The same values in another form: harmless."""
    values = json.loads(path.read_text())
    if isinstance(values, dict):
        values = dict(sorted(values.items(), key=lambda _: chance.random()))
    path.write_text(json.dumps(values, indent=chance.choice((None, 1, 4))))
    return "written anew"


def hostile_json(chance: random.Random, path: Path) -> str:
    text = chance.choice(("[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00", "{} {}", "null"))
    path.write_text(text)
    return f"{text[:9]}... instead"


ANY: tuple[Mutation, ...] = (
    *(flip_bits, flip_bits, flip_bits, flip_in_header, flip_in_header),
    *(truncate, truncate, extend, blank, delete, make_folder, exchange),
)
JSON: tuple[Mutation, ...] = (*ANY, *(edit_json,) * 12, rewrite_json, hostile_json)


def mutate(chance: random.Random, folder: Path, files: list[str]) -> str:
    """Change one of ``files`` in a folder; says which and how."""
    name = chance.choice(files)
    mutation = chance.choice(JSON if name.endswith(".json") else ANY)
    return f"{name}: {mutation(chance, folder / name)}"


def restore(folder: Path, whole: Path) -> None:
    """Make ``folder`` a copy of ``whole`` again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
