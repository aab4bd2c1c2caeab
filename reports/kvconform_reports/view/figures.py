"""How a number of the speed record is printed: its unit, its digits, its interval, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kvconform.bench.record import Ratio, Roof, Summary


@dataclass(frozen=True)
class Unit:
    """Of time; ``ns``: its nanoseconds."""

    name: str
    ns: float

    def of(self, value: float | None) -> str:
        """Nanoseconds in this unit; empty where nothing was measured."""
        return "" if value is None else digits(value / self.ns)

    def interval(self, summary: Summary) -> str:
        return f"{self.of(summary.low)} to {self.of(summary.high)}"


UNITS = (Unit("µs", 1e3), Unit("ms", 1e6), Unit("s", 1e9))


def unit(values: Iterable[float | None], most: str = "s") -> Unit:
    """The largest unit, up to ``most``, in which the least of these nanoseconds is at least 0.1: one for a whole
    column, so that it compares."""
    names = [one.name for one in UNITS]
    allowed = UNITS[: names.index(most) + 1]
    least = min((v for v in values if v is not None and math.isfinite(v) and v > 0), default=1e6)
    return next((one for one in reversed(allowed) if least >= 0.1 * one.ns), allowed[0])


def digits(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 1230."""
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 0.001 else f"{value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """A share; empty where there is none."""
    if value is None:
        return ""
    return f"{digits(100 * value)} %" if abs(value) < 0.001 else f"{100 * value:.1f} %"


def octets(count: int | None) -> str:
    """Bytes in binary units; empty if unknown."""
    if count is None:
        return ""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(count) >= 1024**power:
            return f"{digits(count / 1024**power)} {name}"
    return f"{count} B"


def operations(count: int) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{digits(count / size)} {name}"
    return str(count)


@dataclass(frozen=True)
class Proportion:
    """A ratio of times in words. ``against``: what the other time is of; ``spread``: between restarts, empty with one.

    ``why``: the reason that it is not valid; ``absent``: that it was never measured. Then there is no number.
    """

    text: str = ""
    interval: str = ""
    against: str = ""
    spread: str = ""
    why: str = ""
    absent: str = ""

    @property
    def words(self) -> str:
        times = f" × {self.against}" if self.against else ""
        if self.why or self.absent:
            return f"not valid{times}: {self.why}" if self.why else self.absent
        return f"{self.text}{times} ({self.interval})" if self.interval else f"{self.text}{times}"


def proportion(ratio: Ratio, against: str, *, invert: bool) -> Proportion:
    """``invert``: reference over arm instead of arm over reference."""
    if not ratio.valid:
        return Proportion(against=against, why=ratio.why_invalid or "no reason given")
    middle, low, high = ratio.ratio, ratio.low, ratio.high
    if invert:
        middle, low, high = 1 / middle, 1 / high, 1 / low
    return Proportion(digits(middle), f"{digits(low)} to {digits(high)}", against, percent(ratio.spread))


def roofline(roof: Roof | None) -> Proportion:
    """How much of what the machine allows a decode step reaches; where the record flags it, the flag and no number."""
    if roof is None:
        return Proportion(absent="not measured")
    if roof.flag or roof.fraction is None:
        return Proportion(why=roof.flag or "no reason given")
    low, high = percent(roof.low), percent(roof.high)
    return Proportion(percent(roof.fraction), f"{low} to {high}" if low and high else "")
