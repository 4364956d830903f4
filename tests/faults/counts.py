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


def some(numbers: range, few: int) -> list[int]:
    """All numbers in a long run; in a short one ``few`` of them, the ends included."""
    if LONG or len(numbers) <= few:
        return list(numbers)
    inner = dice("some", numbers).sample(numbers[1:-1], max(few - 2, 0))
    return sorted({numbers[0], *inner, numbers[-1]})
