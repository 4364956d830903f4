"""What params.yaml may hold, said a second time: from the JSON schema and the README's words.

Nothing here asks pydantic to validate. The JSON schema gives types, bounds, choices and defaults;
rules between keys are not repeated, only the keys are known that have any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lib.params.schema import Params

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LARGEST = 2**63  # numbers beyond are valid or not, as libraries please

# Keys whose possible values other keys limit, or that have a form of their own.
_TIED = re.compile(
    r"teacher\.(source|revision)|tokens\.(train|test)\b.*|tokens\.(val|test)_fraction"
    r"|cache\.temperatures|distill\..*|.*\.(method|regularizer|steps|warmup_steps|dtype)"
    r"|.*\.(hard_top1_weight|hard_full_weight|train_mlp_only|freeze_value_output)|.*\.rates\..*"
    r"|quant\.(attention.*|scale|codebook|lut_size|group_size)|convert\.(attention.*|scale|codebook)"
    r"|convert\.(lut_size|group_size)|sensitivity\.(method|file)|layerwise\.(local|global)_weight"
    r"|prox\..*|snap\.form|recover\.mode|ane_check\.modes|export\.(formats|context|prefill_tokens)"
    r"|evaluate\.(perplexity_window|perplexity_stride|tasks)|run\.(device|processes|shard)"
)


@dataclass(frozen=True)
class Leaf:
    """One key of the schema that is no section.

    Attributes:
        path: its way from the root; numbers are indices of lists.
        kinds: JSON types that it may have.
        choices: values that it may have, if they are listed.
        bounds: as in JSON schema.
        has_default: may be left out.
    """

    path: tuple[str | int, ...]
    kinds: frozenset[str]
    has_default: bool
    choices: tuple[Any, ...] | None = None
    bounds: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Its name in messages."""
        return ".".join(map(str, self.path))

    @property
    def free(self) -> bool:
        """Whether no other key has a say in its value."""
        return not _TIED.fullmatch(self.key)

    def permits(self, value: Any) -> bool | None:
        """Whether the field may have this value, whatever the others are; None: hard to say."""
        if self.choices is not None:
            return any(
                value == c and isinstance(value, bool) == isinstance(c, bool) for c in self.choices
            )
        kind = _kind(value)
        if kind == "integer" and "integer" not in self.kinds:
            kind = "number"
        if kind not in self.kinds:
            return False
        if kind in ("array", "string"):
            return None if kind == "array" or not self.free else True
        if kind in ("boolean", "null"):
            return True
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return self._in_bounds(value)

    def _in_bounds(self, value: float) -> bool | None:
        bounds = self.bounds
        if value < bounds.get("minimum", -math.inf) or value > bounds.get("maximum", math.inf):
            return False
        if "exclusiveMinimum" in bounds and value <= bounds["exclusiveMinimum"]:
            return False
        if "exclusiveMaximum" in bounds and value >= bounds["exclusiveMaximum"]:
            return False
        if self.path[-1] == "lut_size":
            return value in POWERS
        if self.path[-1] == "attention_lut_size":
            return value in (0, *POWERS)
        return True if abs(value) < LARGEST else None

    def near(self) -> list[Any]:
        """Values around what it may have."""
        found: list[Any] = list(self.choices or ())
        for bound in self.bounds.values():
            found += [bound, bound - 1, bound + 1, int(bound), bound * (1 + 1e-9), bound - 1e-9]
        if "lut_size" in str(self.path[-1]):
            found += [0, 1, *POWERS, 3, 255, 512]
        return found or [0, 1, True, "x"]


POWERS = tuple(2**bits for bits in range(1, 9))


def _kind(value: Any) -> str:
    for kind, types in (
        ("null", type(None)),
        ("boolean", bool),
        ("integer", int),
        ("number", float),
        ("string", str),
        ("array", list),
    ):
        if isinstance(value, types):  # type: ignore[arg-type]
            return kind
    return "object"


class Schema:
    """All leaves and sections of params.yaml, with one source of training text."""

    def __init__(self) -> None:
        self._root = Params.model_json_schema()
        self.leaves: list[Leaf] = []
        self.sections: dict[tuple[str | int, ...], bool] = {}
        self._walk(self._root, ())

    def _alternatives(self, node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "$ref" in node:
            yield from self._alternatives(self._root["$defs"][node["$ref"].rsplit("/", 1)[1]])
        elif "anyOf" in node or "allOf" in node:
            for part in (*node.get("anyOf", ()), *node.get("allOf", ())):
                yield from self._alternatives(part)
        else:
            yield node

    def _walk(self, section: dict[str, Any], path: tuple[str | int, ...]) -> None:
        required = section.get("required", ())
        for name, node in section["properties"].items():
            here, parts = (*path, name), list(self._alternatives(node))
            if "properties" in parts[0]:
                self.sections[here] = name not in required
                self._walk(parts[0], here)
                continue
            choices = [c for p in parts for c in (*p.get("enum", ()), *_const(p))]
            kinds = {kind for p in parts for kind in _kinds(p)}
            bounds = {b: p[b] for p in parts for b in BOUNDS if b in p}
            listed = tuple(choices) + ((None,) if choices and "null" in kinds else ())
            leaf = Leaf(here, frozenset(kinds), name not in required, listed or None, bounds)
            self.leaves.append(leaf)
            if here == ("tokens", "train"):
                self._walk(next(self._alternatives(parts[0]["items"])), (*here, 0))


def _const(part: dict[str, Any]) -> tuple[Any, ...]:
    return (part["const"],) if "const" in part else ()


def _kinds(part: dict[str, Any]) -> tuple[str, ...]:
    kind = part.get("type", ())
    return (kind,) if isinstance(kind, str) else tuple(kind)


def rates_train(values: dict[str, Any], path: tuple[str | int, ...]) -> bool:
    """Whether anything is left that trains, where ``path`` is a rate; elsewhere yes."""
    if "rates" not in path:
        return True
    node: Any = values
    for part in path[: path.index("rates") + 1]:
        node = node[part]
    return any(node.values())
