"""Where things lie in a log-log chart: numbers for the template, which draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 200, 14, 52
LABEL_GAP, LABEL_CHARACTERS = 16, 26
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "bar")
TONES = len(MARKERS)


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (x, y, low, high). ``kin``: lines of one kin share colour and marker."""

    name: str
    kin: int
    dashed: bool
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    low: float
    high: float
    path: str


@dataclass(frozen=True)
class Line:
    name: str
    short: str
    tone: int
    dashed: bool
    path: str
    marks: tuple[Mark, ...]
    label_y: float
    end: tuple[float, float]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str
    major: bool = True


@dataclass(frozen=True)
class Chart:
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


def log_log(series: Sequence[Series], units: str) -> Chart | None:
    """The chart of series whose y are nanoseconds, ticks in ``units`` ("ms" or "µs"); None where nothing can lie on
    logarithmic axes."""
    kept = [
        (one, points)
        for one in series
        if (points := sorted(p for p in one.points if p[0] > 0 and all(math.isfinite(v) and v > 0 for v in p[1:])))
    ]
    if not kept:
        return None
    xs = sorted({p[0] for _, points in kept for p in points})
    ys = [v for _, points in kept for p in points for v in p[1:]]
    x_of = _scale(xs[0] / 1.12, xs[-1] * 1.12, LEFT, WIDTH - RIGHT)
    bottom, top = _rounded(min(ys) / 1.05, down=True), _rounded(max(ys) * 1.05, down=False)
    y_of = _scale(bottom, top, HEIGHT - BOTTOM, TOP)
    lines = [_line(one, points, x_of, y_of) for one, points in kept]
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    return Chart(
        WIDTH, HEIGHT, LEFT, right, TOP, floor, _x_ticks(xs, x_of), _y_ticks(bottom, top, y_of, units),
        _apart(lines, TOP + 6, floor),
    )  # fmt: skip


@dataclass(frozen=True)
class _Scale:
    """From a value to where it lies, logarithmically."""

    low: float
    factor: float
    start: float

    def __call__(self, value: float) -> float:
        return round(self.start + (math.log(value) - self.low) * self.factor, 1)


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(math.log(low), (end - start) / (math.log(high) - math.log(low)), start)


def _line(one: Series, points: list[tuple[float, float, float, float]], x_of: _Scale, y_of: _Scale) -> Line:
    marker = MARKERS[one.kin % TONES]
    marks = tuple(
        Mark(x_of(x), y_of(y), y_of(low), y_of(high), _marker(marker, x_of(x), y_of(y))) for x, y, low, high in points
    )
    path = "M" + "L".join(f"{mark.x} {mark.y}" for mark in marks)
    short = one.name if len(one.name) <= LABEL_CHARACTERS else one.name[: LABEL_CHARACTERS - 1] + "…"
    last = marks[-1]
    return Line(one.name, short, one.kin % TONES, one.dashed, path, marks, last.y, (last.x, last.y))


def _marker(kind: str, x: float, y: float) -> str:
    """A path around (x, y); the shape tells the backend where colour does not."""
    r = 3.6
    if kind == "circle":
        return f"M{x - r:.1f} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    shapes = {
        "square": ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        "triangle": ((0, -4.4), (4.2, 3.2), (-4.2, 3.2)),
        "diamond": ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
        "cross": (
            (-1.3, -4), (1.3, -4), (1.3, -1.3), (4, -1.3), (4, 1.3), (1.3, 1.3), (1.3, 4), (-1.3, 4), (-1.3, 1.3),
            (-4, 1.3), (-4, -1.3), (-1.3, -1.3),
        ),
        "bar": ((-4.6, -1.8), (4.6, -1.8), (4.6, 1.8), (-4.6, 1.8)),
    }  # fmt: skip
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in shapes[kind]) + "z"


def _apart(lines: list[Line], top: float, bottom: float) -> tuple[Line, ...]:
    """The lines with their labels pushed apart, each as near to its line's end as the others let it."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].end[1])
    places = [lines[i].end[1] for i in order]
    floor = top - LABEL_GAP
    for i, place in enumerate(places):
        floor = places[i] = max(place, floor + LABEL_GAP)
    ceiling = bottom + LABEL_GAP
    for i in reversed(range(len(places))):
        ceiling = places[i] = min(places[i], ceiling - LABEL_GAP)
    at = dict(zip(order, places, strict=True))
    return tuple(
        Line(one.name, one.short, one.tone, one.dashed, one.path, one.marks, round(at[i], 1), one.end)
        for i, one in enumerate(lines)
    )


def _rounded(value: float, *, down: bool) -> float:
    """The next of 1, 2, 5 times a power of ten, so that the axis begins and ends at a tick."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [power * m for m in (1, 2, 5, 10, 20)]
    return max(s for s in steps if s <= value or s == power) if down else min(s for s in steps if s >= value)


def _x_ticks(xs: list[float], x_of: _Scale) -> tuple[Tick, ...]:
    """A tick for each depth that was measured, as far as their texts do not touch."""
    ticks: list[Tick] = []
    for x in xs:
        text, at = f"{x:g}" if x < 10_000 else f"{x / 1024:g}k" if x % 1024 == 0 else f"{x:.0f}", x_of(x)
        if not ticks or at - ticks[-1].at >= 34:
            ticks.append(Tick(at, text))
    return tuple(ticks)


def _y_ticks(bottom: float, top: float, y_of: _Scale, units: str) -> tuple[Tick, ...]:
    per = 1e6 if units == "ms" else 1e3
    decades = math.log10(top / bottom)
    shown = (1, 2, 5) if decades <= 2.5 else (1,)
    ticks = []
    for power in range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1):
        for m in (1, 2, 5):
            value = m * 10.0**power
            if bottom * 0.999 <= value <= top * 1.001:
                ticks.append(Tick(y_of(value), f"{value / per:g}" if m in shown else "", m == 1))
    return tuple(ticks)
