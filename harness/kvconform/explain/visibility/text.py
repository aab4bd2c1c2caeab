"""Visibility maps as text: expected and seen side by side, and in words.

Tokens are counted from 0, as positions are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby

from kvconform.explain.visibility import FORBIDDEN, MISSING, REQUIRED, SEES, Map
from kvconform.explain.visibility.measure import listed

MARKS = {FORBIDDEN: "+", REQUIRED: "-"}
LEGEND = "x sees   . does not see   ? unknown   + sees and must not   - does not see and must"

Span = tuple[int, int, int]
"""Position of an output, and of the first and the last of the tokens side by side that it sees or misses."""
Form = tuple[str, int, str, int]
"""Where such a span begins and ends: at a position (``at``), or so many before the output's own (``back``)."""


def title(one: Map) -> str:
    """``chunked 3+2+1+2``, ``chunked 3+2+1+2 in context 0``."""
    return _schedule(one) + _context(one)


def _context(one: Map) -> str:
    return "" if one.context is None else f" in context {one.context}"


def _schedule(one: Map) -> str:
    sizes = "" if set(one.sizes) == {1} or len(one.sizes) == 1 else " " + "+".join(map(str, one.sizes))
    return one.schedule + sizes


def steps(one: Map) -> dict[int, int]:
    """The first token of each append, of each row or sequence, and the number of the append."""
    starts = [0, *accumulate(one.sizes)][:-1]
    each = sum(one.sizes)
    return {row * each + start: number for row in range(one.rows) for number, start in enumerate(starts)}


def drawing(one: Map) -> str:
    """Lines of text: the title with the differences in words, then expected and seen, side by side.

    A difference is marked by its sign in ``seen``, and at the end of its line.
    """
    n, starts = len(one.wanted), steps(one)
    marks = {(query, key): MARKS[kind] for query, key, kind in one.differences}
    head = _spaced(one, [str(one.place(token)[1]) for token in range(n)])
    lines = [words(one), f"{'':15}{'expected':<{len(head)}}  seen", f"{'':13}{head}  {head}"]
    for query, (want, saw) in enumerate(zip(one.wanted, one.seen, strict=True)):
        row, position = one.place(query)
        label = f"{_noun(one)} {row}" if one.rows > 1 and position == 0 else ""
        if query in starts and not label:
            label = f"step {starts[query]}"
        cells = [marks.get((query, key), cell) for key, cell in enumerate(saw)]
        off = "  <" if cells != list(saw) else ""
        lines.append(f"{label:<10}{position:>3}{_spaced(one, want)}  {_spaced(one, cells)}{off}".rstrip())
    return "\n".join(lines)


def words(one: Map) -> str:
    """``chunked 3+2+1+2: tokens 3 and 6 see the next token (their future)``: each difference, in one line."""
    parts = _phrases(one)
    absent = [i for i, (want, saw) in enumerate(zip(one.wanted, one.seen, strict=True)) if _blank(saw, want)]
    if one.stopped:
        missing = f"no output of {_tokens(one, absent)}; " if absent else ""
        parts.append(f"{missing}stopped at {one.stopped}")
    parts += one.notes
    if one.right:
        parts.insert(0, f"as expected within {len(one.wanted) // one.rows} tokens")
    if one.unresolved:
        parts.append(f"{one.unresolved} cell{'s are' if one.unresolved > 1 else ' is'} not resolvable")
    return f"{title(one)}: {'; '.join(parts) or 'unknown'}"


def coverage(maps: Sequence[Map]) -> str:
    """``full, prefill, chunked 3+2+1+2, decode (8 tokens); rows 2+1+2 (2 rows of 5 tokens)``: what maps cover, and
    the one context that they are of, where there are several."""
    titles: dict[str, list[str]] = defaultdict(list)
    for one in maps:
        tokens = len(one.wanted) // one.rows
        titles[f"{tokens} tokens" if one.rows == 1 else f"{one.rows} {_noun(one)}s of {tokens} tokens"].append(
            _schedule(one)
        )
    covered = "; ".join(f"{', '.join(of)} ({size})" for size, of in titles.items())
    return covered + "".join(dict.fromkeys(f"; all{_context(one)}" for one in maps if one.context is not None))


def _spaced(one: Map, cells: Iterable[str]) -> str:
    """Two or three characters a cell, and a gap before each row or sequence."""
    wide = len(str(len(one.wanted) // one.rows - 1)) + 1
    gaps = (" " if one.place(token)[1] == 0 else "" for token in range(len(one.wanted)))
    return "".join(f"{gap}{cell:>{wide}}" for gap, cell in zip(gaps, cells, strict=True))


def _blank(saw: str, want: str) -> bool:
    return not saw.strip(MISSING) and bool(want.strip(MISSING))


def _noun(one: Map) -> str:
    return "sequence" if one.schedule == "sequences" else "row"


def _tokens(one: Map, tokens: Sequence[int]) -> str:
    if one.rows == 1:
        return _token(tokens)
    rows = defaultdict(list)
    for token in tokens:
        row, position = one.place(token)
        rows[row].append(position)
    return ", ".join(f"{_token(positions)} of {_noun(one)} {row}" for row, positions in rows.items())


def _token(positions: Sequence[int]) -> str:
    return f"token{'s' if len(positions) > 1 else ''} {listed(positions)}"


# --- differences, in as few sentences as possible ---
def _phrases(one: Map) -> list[str]:
    spans: dict[tuple[str, str, int, int], list[Span]] = defaultdict(list)
    for (kind, why, row, other, i), keys in _keys(one).items():
        for _key, run in groupby(enumerate(keys), lambda pair: pair[1] - pair[0]):
            positions = [position for _index, position in run]
            spans[kind, why, row, other].append((i, positions[0], positions[-1]))
    said: dict[tuple[str, bool], list[int]] = defaultdict(list)
    noun = _noun(one)
    for (kind, why, row, other), items in spans.items():
        for queries, form in _grouped(items):
            if row == other and form == ("at", queries[0], "at", queries[0]):
                form = ("back", 0, "back", 0)  # itself
            phrase = _phrase(kind, why, queries, form) + (_only(one, row, queries) if kind == REQUIRED else "")
            if row != other:
                phrase = f"in {noun} {row} {phrase} of {noun} {other}"
            said[phrase, row == other].append(row)
    return [
        f"in {noun}{'s' if len(rows) > 1 else ''} {listed(rows)} {phrase}" if own and one.rows > 1 else phrase
        for (phrase, own), rows in said.items()
    ]


def _only(one: Map, row: int, queries: list[int]) -> str:
    """What the outputs see that miss something, where all see the same few tokens of their own row."""
    each = len(one.wanted) // one.rows
    seen = {tuple(i for i, cell in enumerate(one.seen[row * each + query]) if cell == SEES) for query in queries}
    (first, *others) = seen
    if others or len(first) > 2 or any(one.place(token)[0] != row for token in first):
        return ""
    return f", only {_token([one.place(token)[1] for token in first])}" if first else ", nor any other"


def _keys(one: Map) -> dict[tuple[str, str, int, int, int], list[int]]:
    """Positions that are wrongly seen or missed, by kind, reason, row of the output, row of the token, and output."""
    found: dict[tuple[str, str, int, int, int], list[int]] = defaultdict(list)
    for query, key, kind in one.differences:
        (row, i), (other, j) = one.place(query), one.place(key)
        why = "" if kind == REQUIRED or row != other else "future" if j > i else "reach"
        found[kind, why, row, other, i].append(j)
    return found


def _grouped(items: list[Span]) -> Iterable[tuple[list[int], Form]]:
    """Outputs whose spans have the same form, the largest group first."""
    left = list(items)
    while left:
        counted = Counter(form for item in left for form in _forms(item))
        form = max(counted, key=lambda form: (counted[form], form[0] == form[2] == "at", form[0] == "at"))
        yield sorted(item[0] for item in left if form in _forms(item)), form
        left = [item for item in left if form not in _forms(item)]


def _forms(item: Span) -> list[Form]:
    i, first, last = item
    return [
        (*start, *end) for start in (("at", first), ("back", i - first)) for end in (("at", last), ("back", i - last))
    ]


def _phrase(kind: str, why: str, queries: list[int], form: Form) -> str:
    many = len(queries) > 1
    verb = {FORBIDDEN: "see" if many else "sees", REQUIRED: f"do{'' if many else 'es'} not see"}[kind]
    own = "their" if many else "its"
    reason = {"future": f" ({own} future)", "reach": " (out of reach)", "": ""}[why]
    return f"{_token(queries)} {verb} {_object(form, own)}{reason}"


def _object(form: Form, own: str) -> str:
    (start, first, end, last), themselves = form, "themselves" if own == "their" else "itself"
    if (start, end) == ("at", "at"):
        return _token(range(first, last + 1))
    if (start, first) == (end, last):
        names = {0: themselves, -1: "the next token", 1: "the token before"}
        return names.get(first, f"the token {abs(first)} {'back' if first > 0 else 'ahead'}")
    return f"the tokens from {_end(start, first, own)} to {_end(end, last, own)}"


def _end(kind: str, place: int, own: str) -> str:
    if kind == "at":
        return str(place)
    if place in (0, 1, -1):
        return {0: f"{own} own", 1: "the one before", -1: "the next one"}[place]
    return f"{abs(place)} {'back' if place > 0 else 'ahead'}"
