"""Where things lie in a log-log chart: numbers for the template, which draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvconform_reports.view.figures import Unit

WIDTH, HEIGHT = 780, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 220, 14, 52
LABEL_GAP, LABEL_CHARACTERS = 16, 29
BEYOND = 3.0
"""How far past the outermost point an interval may stretch the axis; a longer one ends at the frame."""
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "bar")
TONES = len(MARKERS)


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (x, y, low, high). ``kin``: lines of one kin share colour and marker; a negative one is
    a bound and has no marks. ``stroke``: solid, dashed or dotted."""

    name: str
    kin: int
    stroke: str
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
    tone: str
    stroke: str
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


def log_log(series: Sequence[Series], unit: Unit) -> Chart | None:
    """The chart of series whose y are nanoseconds, ticks in ``unit``; None where nothing can lie on such axes."""
    kept = [
        (one, points)
        for one in series
        if (points := sorted(p for p in one.points if p[0] > 0 and all(math.isfinite(v) and v > 0 for v in p[1:])))
    ]
    if not kept:
        return None
    xs = sorted({p[0] for _, points in kept for p in points})
    ys = [p[1] for _, points in kept for p in points]
    ends = [v for _, points in kept for p in points for v in p[2:]]
    least, most = max(min(ys + ends), min(ys) / BEYOND), min(max(ys + ends), max(ys) * BEYOND)
    height = max(HEIGHT, TOP + BOTTOM + LABEL_GAP * len(kept))
    x_of = _scale(xs[0] / 1.12, xs[-1] * 1.12, LEFT, WIDTH - RIGHT)
    bottom, top = _rounded(least / 1.05, down=True), _rounded(most * 1.05, down=False)
    y_of = _scale(bottom, top, height - BOTTOM, TOP)
    lines = [_line(one, points, x_of, y_of) for one, points in kept]
    right, floor = WIDTH - RIGHT, height - BOTTOM
    return Chart(
        WIDTH,
        height,
        LEFT,
        right,
        TOP,
        floor,
        _x_ticks(xs, x_of),
        _y_ticks(bottom, top, y_of, unit),
        _apart(lines, TOP + 6, floor),
    )


@dataclass(frozen=True)
class _Scale:
    """From a value to where it lies, logarithmically; what lies outside lies at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(math.log(low), math.log(high), start, end)


def _line(one: Series, points: list[tuple[float, float, float, float]], x_of: _Scale, y_of: _Scale) -> Line:
    places = [(x_of(x), y_of(y)) for x, y, *_ in points]
    marker, tone = MARKERS[one.kin % TONES], "bound" if one.kin < 0 else f"t{one.kin % TONES}"
    marks = tuple(
        Mark(x, y, y_of(low), y_of(high), _marker(marker, x, y))
        for (x, y), (_, _, low, high) in zip(places, points, strict=True)
        if one.kin >= 0
    )
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    return Line(one.name, _short(one.name), tone, one.stroke, path, marks, places[-1][1], places[-1])


def _short(name: str) -> str:
    """Shortened before its last word, which distinguishes the lines of one backend."""
    if len(name) <= LABEL_CHARACTERS:
        return name
    head, _, tail = name.rpartition(" ")
    room = LABEL_CHARACTERS - len(tail) - 2
    return f"{head[:room]}… {tail}" if room > 0 else f"{name[: LABEL_CHARACTERS - 1]}…"


def _marker(kind: str, x: float, y: float) -> str:
    """A path around (x, y); the shape identifies the backend without colour."""
    r = 3.6
    if kind == "circle":
        return f"M{x - r:.1f} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    shapes = {
        "square": ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        "triangle": ((0, -4.4), (4.2, 3.2), (-4.2, 3.2)),
        "diamond": ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
        "cross": (
            (-1.3, -4),
            (1.3, -4),
            (1.3, -1.3),
            (4, -1.3),
            (4, 1.3),
            (1.3, 1.3),
            (1.3, 4),
            (-1.3, 4),
            (-1.3, 1.3),
            (-4, 1.3),
            (-4, -1.3),
            (-1.3, -1.3),
        ),
        "bar": ((-4.6, -1.8), (4.6, -1.8), (4.6, 1.8), (-4.6, 1.8)),
    }
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
    return tuple(replace(one, label_y=round(at[i], 1)) for i, one in enumerate(lines))


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


def _y_ticks(bottom: float, top: float, y_of: _Scale, unit: Unit) -> tuple[Tick, ...]:
    decades = math.log10(top / bottom)
    shown = (1, 2, 5) if decades <= 2.5 else (1,)
    ticks = []
    for power in range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1):
        for m in (1, 2, 5):
            value = m * 10.0**power
            if bottom * 0.999 <= value <= top * 1.001:
                ticks.append(Tick(y_of(value), f"{value / unit.ns:g}" if m in shown else "", m == 1))
    return tuple(ticks)
