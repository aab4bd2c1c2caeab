"""Two kinds of charts as SVG: strips of dots on a scale of ratios, and lines of shares over a count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT, ROW = 760, 210, 30, 34
TONES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Distinct for most kinds of colour vision (Okabe and Ito 2008)."""


def strips(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Each row has a name and one dot for each ratio, on a common logarithmic scale with 1 in the middle."""
    most = max(abs(math.log(ratio)) for _, ratios in rows for ratio in ratios)
    most = max(most * 1.05, 0.01)
    middle, half = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - RIGHT - LEFT) / 2
    bottom = 16 + ROW * len(rows)
    parts = []
    for value in _ticks(most):
        for sign in (1, -1) if value else (1,):
            x = middle + half * math.log(1 + sign * value) / most
            if LEFT <= x <= WIDTH - RIGHT:
                label = "equal" if value == 0 else f"{sign * 100 * value:+g} %"
                parts.append(_rule(x, 10, x, bottom, "#999" if value == 0 else "#ddd"))
                parts.append(_text(x, bottom + 18, label, "middle"))
    for number, (name, ratios) in enumerate(rows):
        y = 10 + ROW * (number + 0.5)
        parts.append(_text(LEFT - 10, y + 4, name, "end"))
        for place, ratio in enumerate(ratios):  # at one height the dots would hide each other
            x, shift = middle + half * math.log(ratio) / most, (place % 5 - 2) * 4
            parts.append(f'<circle cx="{x:.1f}" cy="{y + shift:.1f}" r="3" fill="{TONES[number % 3]}" opacity=".6"/>')
    return _drawing(bottom + 30, parts)


def _ticks(most: float) -> list[float]:
    """Round shares from 0 up to about ``most``, at most six."""
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) if math.log1p(s) * 5 >= most)
    return [step * n for n in range(6) if step * n < 0.95 or n == 0]


def lines(curves: Sequence[tuple[str, bool, Sequence[tuple[int, float]]]], nominal: tuple[str, float]) -> str:
    """Each curve is a name, whether it is dashed, and points (count, share). ``nominal``: a level line."""
    left, right, top, bottom = 60, 230, 14, 250
    counts = sorted({count for _, _, points in curves for count, _ in points})
    low, high = math.log(counts[0]), math.log(max(counts[-1], counts[0] + 1))

    def x_of(count: int) -> float:
        return left + (WIDTH - right - left) * (math.log(count) - low) / (high - low)

    def y_of(share: float) -> float:
        return bottom - (bottom - top) * share

    parts = []
    for tenth in range(0, 11, 2):
        y = y_of(tenth / 10)
        parts += [_rule(left, y, WIDTH - right, y, "#ddd"), _text(left - 8, y + 4, f"{10 * tenth} %", "end")]
    for count in counts:
        parts += [
            _rule(x_of(count), top, x_of(count), bottom, "#eee"),
            _text(x_of(count), bottom + 18, f"{count}", "middle"),
        ]
    parts.append(_text((left + WIDTH - right) / 2, bottom + 36, "samples of each process", "middle"))
    ends = []
    for number, (name, dashed, points) in enumerate(curves):
        tone, dash = TONES[number % len(TONES)], ' stroke-dasharray="6 4"' if dashed else ""
        path = "M" + "L".join(f"{x_of(count):.1f} {y_of(share):.1f}" for count, share in points)
        parts.append(f'<path d="{path}" fill="none" stroke="{tone}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x_of(c):.1f}" cy="{y_of(s):.1f}" r="3" fill="{tone}"/>' for c, s in points]
        ends.append((y_of(points[-1][1]), name, tone))
    level = y_of(nominal[1])
    parts.append(_rule(left, level, WIDTH - right, level, "#000"))
    ends.append((level, nominal[0], "#000"))
    floor = 0.0
    for y, name, tone in sorted(ends):
        floor = max(y, floor + 16)
        parts.append(_text(WIDTH - right + 10, floor + 4, name, "start", tone))
    return _drawing(bottom + 50, parts)


def _rule(x1: float, y1: float, x2: float, y2: float, tone: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{tone}"/>'


def _text(x: float, y: float, words: str, anchor: str, tone: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{tone}">{escape(words)}</text>'


def _drawing(height: float, parts: Sequence[str]) -> str:
    """On a white ground, so that it is also readable on a dark page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"
