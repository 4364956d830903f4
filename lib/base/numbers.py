"""Numbers on their way into JSON."""

from __future__ import annotations

import math


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it (NaN, infinity)."""
    return value if value is not None and math.isfinite(value) else None
