"""Visibility maps, drawn: expected and seen side by side as one SVG picture, and the same in words.

Differences differ in shape: a disc with a plus is seen and must not be, a dashed frame with a minus is not seen and
must be. Colours are the report's own (``style.css``), as presentation attributes, which its policy allows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from markupsafe import Markup, escape

from kvconform.explain.visibility import BLIND, FORBIDDEN, REQUIRED, SEES, UNKNOWN, Map
from kvconform.explain.visibility import text as visibility_text

CELL, LEFT, BETWEEN, TOP, EDGE = 17, 82, 34, 38, 3
"""Pixels: a cell; names and numbers of the outputs; between the pictures; names and numbers above; the margin."""
GROUP = 7
"""Pixels between two rows or sequences."""
LEGEND = (
    (SEES, "sees"),
    (BLIND, "does not see"),
    (UNKNOWN, "unknown"),
    (FORBIDDEN, "sees and must not"),
    (REQUIRED, "does not see and must"),
)
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # no escape makes these legal XML

Places = Mapping[str, list[tuple[float, float]]]
"""Centres of cells, by what they show."""


def words(one: Map) -> str:
    """The text equivalent: the schedule and each difference."""
    return _ILLEGAL.sub("�", visibility_text.words(one))


def drawing(one: Map) -> Markup:
    """``<svg role="img">`` with its title and the words as its description; it needs the report's style sheet."""
    n = len(one.wanted)
    size = _along(one, n - 1) + CELL / 2 + EDGE
    second = LEFT + size + BETWEEN
    found = {(query, key): kind for query, key, kind in one.differences}
    seen = [[found.get((query, key), cell) for key, cell in enumerate(line)] for query, line in enumerate(one.seen)]
    panels = ((LEFT, "expected", one.wanted), (second, "seen", seen))
    parts = [_outputs(one), _rules(one, LEFT, second)]
    for x, name, cells in panels:
        parts.append(_heads(one, x, name))
        parts.append(_marks(_places(one, cells, x)))
    width, height = second + size, TOP + size
    head = Markup('<svg role="img" class="map" width="{0:g}" height="{1:g}" viewBox="0 0 {0:g} {1:g}">')
    named = Markup("<title>Visibility map: {}</title><desc>{}</desc>").format(visibility_text.title(one), words(one))
    style = Markup('<g font-size="10" fill="var(--soft)">')
    return head.format(width, height) + named + style + Markup("").join(parts) + Markup("</g></svg>")


def legend() -> Markup:
    """What the marks mean, as a picture for all drawings of a page."""
    x, parts = float(EDGE), []
    for kind, text in LEGEND:
        parts.append(_marks({kind: [(x + CELL / 2, CELL / 2)]}))
        parts.append(_text(x + CELL + 4, CELL / 2 + 4, text, "start"))
        x += CELL + 4 + 6.2 * len(text) + 16
    title = Markup("<title>Marks of the maps: {}</title>").format(", ".join(text for _kind, text in LEGEND))
    head = Markup('<svg role="img" class="map" width="{0:g}" height="{1}" viewBox="0 0 {0:g} {1}">').format(x, CELL)
    return (
        head + title + Markup('<g font-size="11" fill="var(--soft)">') + Markup("").join(parts) + Markup("</g></svg>")
    )


def _along(one: Map, token: int) -> float:
    """How far the middle of a token's cells is from the first cell's edge."""
    return token * CELL + CELL / 2 + one.place(token)[0] * GROUP


def _places(one: Map, lines: Iterable[Iterable[str]], x: float) -> Places:
    places: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for query, cells in enumerate(lines):
        for key, cell in enumerate(cells):
            places[cell].append((x + _along(one, key), TOP + _along(one, query)))
    return places


def _heads(one: Map, x: float, name: str) -> Markup:
    """The name of a picture and the positions of the tokens, above it and beside it."""
    parts = [Markup('<text x="{:g}" y="12" font-size="12" fill="var(--ink)">{}</text>').format(x, name)]
    for token in range(len(one.wanted)):
        position, along = str(one.place(token)[1]), _along(one, token)
        parts.append(_text(x + along, TOP - 5, position, "middle"))
        parts.append(_text(x - 5, TOP + along + 3.5, position, "end"))
    return Markup("").join(parts)


def _outputs(one: Map) -> Markup:
    """The names of steps, and of rows or sequences, at the left."""
    noun = "sequence" if one.schedule == "sequences" else "row"
    parts = []
    for token, step in visibility_text.steps(one).items():
        row, position = one.place(token)
        name = f"{noun} {row}" if one.rows > 1 and position == 0 else f"step {step}"
        parts.append(_text(0, TOP + _along(one, token) + 3.5, name, "start"))
    return Markup("").join(parts)


def _rules(one: Map, *panels: float) -> Markup:
    """A line where a step begins, and a frame around each row's own tokens."""
    starts = [token for token in visibility_text.steps(one) if one.place(token)[1] > 0]
    each = len(one.wanted) // one.rows
    lines, side = [], each * CELL
    for x in panels:
        for row in range(one.rows):
            begin = _along(one, row * each) - CELL / 2
            lines.append(f"M{x + begin:g} {TOP + begin:g}h{side}v{side}h{-side}z")
        for token in starts:
            row, y = one.place(token)[0], TOP + _along(one, token) - CELL / 2
            lines.append(f"M{x + _along(one, row * each) - CELL / 2:g} {y:g}h{side}")
    return Markup('<path fill="none" stroke="var(--rule)" d="{}"/>').format("".join(lines))


def _marks(places: Places) -> Markup:
    """The marks of cells: one path for each kind of mark."""
    drawn = {
        SEES: ('fill="var(--ink)"', "M{l:g} {t:g}h9v9h-9z", 4.5),
        BLIND: ('fill="none" stroke="var(--none-fill)" stroke-width="2" stroke-linecap="round"', "M{x:g} {y:g}h0", 0),
        FORBIDDEN: ('fill="var(--bad-fill)"', "M{l:g} {y:g}a7 7 0 1 0 14 0a7 7 0 1 0 -14 0z", 7),
        REQUIRED: (
            'fill="none" stroke="var(--bad-fill)" stroke-width="1.5" stroke-dasharray="3 1.8"',
            "M{l:g} {t:g}h12v12h-12z",
            6,
        ),
    }
    signs = {
        FORBIDDEN: ('fill="none" stroke="var(--raised)" stroke-width="2"', "M{l:g} {y:g}h8M{x:g} {t:g}v8", 4),
        REQUIRED: ('fill="none" stroke="var(--bad)" stroke-width="2"', "M{l:g} {y:g}h6", 3),
    }
    parts = [
        Markup('<path {} d="{}"/>').format(
            Markup(look), "".join(shape.format(x=x, y=y, l=x - half, t=y - half) for x, y in places[kind])
        )
        for table in (drawn, signs)
        for kind, (look, shape, half) in table.items()
        if places.get(kind)
    ]
    parts += [_text(x, y + 3.5, UNKNOWN, "middle") for x, y in places.get(UNKNOWN, ())]
    return Markup("").join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:g}" y="{:g}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(text))
