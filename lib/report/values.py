"""Values as the page shows them: short, with the exact number kept in the markup."""

from __future__ import annotations

import json
import math
from typing import Any

from markupsafe import Markup

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
MISSING = Markup('<span class="missing" title="not there">{}</span>').format(DASH)


def shown(value: Any, digits: int | None = None) -> Markup:
    """A value in HTML: numbers as ``<data>`` whose attribute holds every digit.

    Args:
        digits: decimals; None chooses by size.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return Markup("yes") if value else Markup("no")
    if isinstance(value, int | float):
        return Markup('<data value="{}">{}</data>').format(json.dumps(value), short(value, digits))
    if isinstance(value, str):
        return Markup("{}").format(value) if value else Markup("<i>empty</i>")
    if isinstance(value, list):
        return Markup("<br>").join(shown(item) for item in value)
    return Markup("{}").format(json.dumps(value, ensure_ascii=False))


def short(value: float, digits: int | None = None) -> str:
    """A number in few characters."""
    if isinstance(value, int) and digits is None:
        return f"{value:,}"
    if not math.isfinite(value):
        return "infinite" if value > 0 else "not finite"
    if digits is not None and (abs(value) < 1e5):
        return f"{value:,.{digits}f}"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def change(new: Any, old: Any, digits: int | None = None, *, share: bool = True) -> Markup:
    """How far ``new`` is from ``old``; ``share``: also in per cent, unless that is silly."""
    if new == old:
        return Markup("same")
    if not _is_number(new) or not _is_number(old):
        return Markup("") if new is None or old is None else Markup("differs")
    difference = new - old
    sign = "+" if difference > 0 else MINUS
    text = f"{sign}{short(abs(difference), digits)}"
    if share and 0.0005 < abs(difference / (old or math.inf)) < 10:
        text += f" ({sign}{100 * abs(difference / old):.1f} %)"
    return Markup('<data value="{}">{}</data>').format(json.dumps(difference), text)


def prose(text: str | Markup) -> Markup:
    """Plain text in which `these` are code."""
    if isinstance(text, Markup):
        return text
    pieces = str(text).split("`")
    if len(pieces) % 2 == 0:  # one is left over: they mean something else
        return Markup("{}").format(text)
    return Markup("").join(
        Markup("<code>{}</code>" if number % 2 else "{}").format(piece)
        for number, piece in enumerate(pieces)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists stay whole."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def lookup(values: Any, dotted: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values
