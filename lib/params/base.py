"""What every section of params.yaml has in common, and the value types that sections share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen section: unknown keys, lax conversions (true for 1, "3" for 3), NaN are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def _lut_size(value: int) -> int:
    if not (2 <= value <= 256 and value & (value - 1) == 0):
        raise ValueError("must be a power of two from 2 to 256, say 4 or 16")
    return value


def _lut_size_or_same(value: int) -> int:
    if value == 0:
        return value
    try:
        return _lut_size(value)
    except ValueError as error:
        raise ValueError(f"{error}, or 0 for the same as the MLPs") from None


def not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Validator of lists that need an element."""
    if not value:
        raise ValueError("must have at least one element")
    return value


Count = Annotated[int, Field(ge=1)]
"""A number of things, at least one."""

CountOrZero = Annotated[int, Field(ge=0)]
"""A number of things; the docstring of the field says what 0 means."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of one stage's generators: 0 to 2**32 - 1."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

LutSize = Annotated[int, AfterValidator(_lut_size)]
"""Entries of a lookup table."""

LutSizeOrSame = Annotated[int, AfterValidator(_lut_size_or_same)]
"""Entries of attention's lookup table; 0 = as many as the MLPs have."""
