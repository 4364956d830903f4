"""How much is tried: a little in every run of the suite, all of it with LUTQAT_SOAK=1."""

from __future__ import annotations

import os
import random

LONG = os.environ.get("LUTQAT_SOAK", "") not in ("", "0")
SEED = int(os.environ.get("LUTQAT_SEED", "0"))


def often(short: int, long: int) -> int:
    """The number of tries of this run."""
    return long if LONG else short


def dice(*what: object) -> random.Random:
    """A generator for one try; the same every time, another one for each LUTQAT_SEED."""
    return random.Random(repr((SEED, *what)))


def chosen(names: list[str], few: int, what: str) -> list[str]:
    """All names in a long run, ``few`` of them in a short one."""
    return names if LONG else dice("chosen", what).sample(names, few)


def some(numbers: range, few: int) -> list[int]:
    """All numbers in a long run, ``few`` of them in a short one."""
    if LONG or len(numbers) <= few:
        return list(numbers)
    return sorted(dice("some", numbers).sample(numbers, few))
