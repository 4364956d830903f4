"""Charts as inline SVG that takes its colours from the page, so it follows the reader's theme.

Colours are CSS classes (``t0`` to ``t7`` are the page's eight tones), never values. Everything that
is written into a chart is escaped. The same data give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

TONES = 8
_TOP, _RIGHT, _BOTTOM, _LEFT = 10, 12, 38, 52  # margins around the plotted area, user units
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve or cloud of points ``(x, y)``; what is not finite is left out.

    Attributes:
        tone: index of its colour. line, dots: what is drawn of it. radius: of its dots.
        other: it belongs to the experiment that is compared with: dashed and hollow.
        names: of the points, for what is shown when one is pointed at.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: int = 0
    line: bool = True
    dots: bool = True
    radius: float = 3
    faint: bool = False
    other: bool = False
    names: Sequence[str] = ()

    @property
    def classes(self) -> str:
        """CSS classes of its marks."""
        flags = (("faint", self.faint), ("other", self.other))
        return " ".join([f"t{self.tone % TONES}", *(name for name, on in flags if on)])


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar: ``label`` left of it, ``text`` right of it; None is no bar but says so."""

    label: str
    value: float | None
    text: str
    tone: int = 0
    other: bool = False


def plot(
    series: Sequence[Series],
    label: str,
    *,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (400, 240),
    log: bool = False,
    limit: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Curves over common axes.

    Args:
        label: what a reader who cannot see the chart is told.
        size: width and height in user units (pixels where the page has room).
        log: logarithmic y; what is not positive is left out.
        limit: a value of y to draw a line at.
        marks: places on x where something begins, and its name.
    """
    series = [_drawable(one, log) for one in series]
    width, height = size
    xs = [x for one in series for x, _ in one.points] or [0.0, 1.0]
    ys = [y for one in series for _, y in one.points] or [1.0]
    ys = ys if limit is None else [*ys, limit]
    x_scale = _Scale(min(xs), max(xs), _LEFT, width - _RIGHT)
    y_scale = _Scale(min(ys), max(ys), height - _BOTTOM, _TOP, log=log, pad=0.06)
    parts = [_y_axis(y_scale, width, y_label), _x_axis(x_scale, height, x_label, marks)]
    if limit is not None:
        y = y_scale(limit)
        parts.append(
            Markup('<line class="limit" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, width - _RIGHT, _short(y), _short(y)
            )
        )
    parts += [_curve(one, x_scale, y_scale) for one in series]
    return _svg(width, height, label, parts)


def bars(rows: Sequence[Bar], label: str, *, width: int = 400) -> Markup:
    """Horizontal bars from zero, one under the other."""
    step, left, right = 24, 104, 62
    largest = max((row.value for row in rows if row.value is not None), default=0.0) or 1.0
    parts = []
    for number, row in enumerate(rows):
        middle = 4 + step * number + step / 2
        length = (width - left - right) * max(row.value or 0.0, 0.0) / largest
        parts.append(
            Markup(
                '<text class="name" x="{}" y="{}" text-anchor="end">{}</text>'
                '<rect class="bar t{}{}" x="{}" y="{}" width="{}" height="14" rx="2"/>'
                '<text x="{}" y="{}">{}</text>'
            ).format(
                *(left - 8, _short(middle + 4), row.label),
                *(row.tone % TONES, " other" if row.other else "", left, _short(middle - 7)),
                *(_short(max(length, 0.5 if row.value is not None else 0)),),
                *(_short(left + length + 6), _short(middle + 4), row.text),
            )
        )
    return _svg(width, 8 + step * len(rows), label, parts)


def heat(rows: dict[str, dict[int, float]], label: str, *, unit: str) -> Markup:
    """A cell per value: rows by name, columns by number (of the decoder block); darker is more.

    The scale is logarithmic where all values are positive.
    """
    columns = max((column for row in rows.values() for column in row), default=0) + 1
    cell, left, top = max(18, min(34, 950 // columns)), 78, 6
    high = 24
    values = [v for row in rows.values() for v in row.values() if math.isfinite(v)] or [0.0]
    log = min(values) > 0
    scale = _Scale(min(values), max(values), 0.08, 1.0, log=log)
    width, bottom = left + cell * columns + 8, top + high * len(rows)
    parts = []
    for number, (name, row) in enumerate(rows.items()):
        y = top + high * number
        parts.append(
            Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
                left - 8, y + 16, name
            )
        )
        parts += [
            Markup(
                '<rect class="cell" x="{}" y="{}" width="{}" height="22" rx="2" '
                'fill-opacity="{}"><title>{}, block {}: {}</title></rect>'
            ).format(
                *(left + cell * column, y, cell - 2, f"{scale(value):.3f}"),
                *(name, column, f"{value:.4g}"),
            )
            for column, value in row.items()
            if math.isfinite(value)
        ]
    for column in range(0, columns, 1 if columns <= 12 else 5):
        parts.append(_text(left + cell * (column + 0.5) - 1, bottom + 12, str(column), "middle"))
    parts.append(_text(left, bottom + 31, _few(min(values))))
    for number in range(6):
        parts.append(
            Markup(
                '<rect class="cell" x="{}" y="{}" width="16" height="10" fill-opacity="{}"/>'
            ).format(left + 60 + 16 * number, bottom + 22, f"{0.08 + 0.92 * number / 5:.3f}")
        )
    end = f"{_few(max(values))} {unit}{' (logarithmic)' if log else ''}"
    parts.append(_text(left + 164, bottom + 31, end))
    return _svg(max(width, left + 170 + 6 * len(end)), bottom + 38, label, parts)


class _Scale:
    """Values to places, linear or logarithmic; an empty range is widened."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        log: bool = False,
        pad: float = 0.0,
    ) -> None:
        self.log = log
        low, high = self._inner(low), self._inner(high)
        if high - low <= 1e-12 * max(abs(low), abs(high)):  # one value: it stands in the middle
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        room = pad * (high - low)
        self.low, self.high = low - room, high + room
        self.start, self.end = start, end

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._inner(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Round values inside the range, with their labels: at most about ``most``."""
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span / most))
        step *= next((m for m in (1, 2, 5) if span / (step * m) <= most), 10)
        if self.log and span < 2:  # too few powers of ten
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            fine = [m * 10.0**power for power in powers for m in (1, 2, 5)]
            return [(v, f"{v:g}") for v in fine if self.low <= math.log10(v) <= self.high]
        if self.log:
            step = max(1.0, step)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        places = [number * step for number in numbers]
        if self.log:
            return [(10.0**place, _power(place)) for place in places]
        digits = max(0, -math.floor(math.log10(step)))
        return [(place, _tick(place, digits)) for place in places]


def _tick(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if digits <= 4 and abs(value) < 1e6 else f"{value:.3g}"


def _power(exponent: float) -> str:
    number = round(exponent)
    return f"{10.0**number:g}" if 0 <= number <= 3 else f"10{str(number).translate(_SUPERSCRIPT)}"


def _drawable(series: Series, log: bool) -> Series:
    """The series without what cannot be drawn."""
    kept = [
        index
        for index, (x, y) in enumerate(series.points)
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
    ]
    return replace(
        series,
        points=[series.points[index] for index in kept],
        names=[series.names[index] for index in kept] if series.names else (),
    )


def _curve(series: Series, x: _Scale, y: _Scale) -> Markup:
    """Line and dots of one series."""
    places = [(_short(x(a)), _short(y(b))) for a, b in series.points]
    parts = []
    if series.line and len(places) > 1:
        joined = " ".join(f"{a},{b}" for a, b in places)
        parts.append(
            Markup('<polyline class="line {}" points="{}"/>').format(series.classes, joined)
        )
    if series.dots:
        names = series.names or [f"{series.name}, {a:g}" for a, _ in series.points]
        parts += [
            Markup(
                '<circle class="dot {}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>'
            ).format(series.classes, a, b, series.radius, f"{name}: {value:.5g}")
            for (a, b), name, (_, value) in zip(places, names, series.points, strict=True)
        ]
    return Markup("").join(parts)


def _y_axis(scale: _Scale, width: int, label: str) -> Markup:
    parts = []
    for value, text in scale.ticks(5):
        y = scale(value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, width - _RIGHT, _short(y), _short(y)
            )
        )
        parts.append(_text(_LEFT - 6, y + 4, text, "end"))
    middle = (scale.start + scale.end) / 2
    parts.append(
        Markup('<text class="axis" transform="translate(11 {}) rotate(-90)" {}>{}</text>').format(
            _short(middle), Markup('text-anchor="middle"'), label
        )
    )
    return Markup("").join(parts)


def _x_axis(scale: _Scale, height: int, label: str, marks: Sequence[tuple[float, str]]) -> Markup:
    base = height - _BOTTOM
    parts = [
        Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            _short(scale.start), _short(scale.end), base, base
        )
    ]
    shown = marks or scale.ticks(6)
    taken = -math.inf
    for value, text in shown:
        x = scale(value)
        if marks:
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    _short(x), _short(x), _TOP, base
                )
            )
        if x < taken:  # no room for its name
            continue
        taken = x + 7 * len(text) + 6
        parts.append(_text(x, base + 14, text, "start" if marks else "middle"))
    middle = (scale.start + scale.end) / 2
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _short(middle), height - 5, label
        )
    )
    return Markup("").join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
        _short(x), _short(y), anchor, text
    )


def _few(value: float) -> str:
    return f"{value:.2g}" if not 10 <= abs(value) < 1e5 else f"{value:,.0f}"


def _short(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(width: int, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" style="--w:{}px" role="img" aria-label="{}">{}</svg>'
    ).format(width, _short(height), width, label, Markup("").join(parts))
