"""What is special about a vector, in words: a person who sees it fail knows where to look."""

from __future__ import annotations

from collections.abc import Callable

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case
from kvconform_specs.program import Append, Poison, Reject, UncachedForward
from kvconform_specs.situations import (
    CHUNK,
    DECODE,
    FORK,
    IN_TURN,
    RAGGED,
    REORDER,
    RESET,
    SWITCH,
    TRUNCATION,
    Situation,
    Visit,
    append,
    step,
    walk,
)


def _of_append(words: str, that: Callable[[Append], object]) -> Situation:
    return append(words, lambda visit: isinstance(visit.step, Append) and bool(that(visit.step)))


def _around_window(visit: Visit) -> bool:
    w = visit.config.window
    return w is not None and any(visit.past <= length <= visit.longest for length in (w - 1, w, w + 1))


def _past_window(visit: Visit) -> bool:
    return visit.config.window is not None and visit.longest > visit.config.window


FLAGS: dict[str, Situation] = {
    "decode step": DECODE,
    "chunk on a cache": CHUNK,
    "window edge": append("a length around the window", _around_window),
    "past the window": append("more tokens than the window", _past_window),
    "full": append("a sequence that reaches the capacity", lambda visit: visit.longest == visit.config.capacity),
    "changes with the length": SWITCH,
    "rows of different lengths": RAGGED,
    "left padding": _of_append("left padding", lambda call: call.pad is not None and call.pad[0] == "left"),
    "needle": _of_append("a needle", lambda call: call.needle),
    "mask": _of_append("a mask", lambda call: call.masked),
    "NaN": _of_append("NaN", lambda call: call.nan or call.distribution == "nan"),
    "large queries": _of_append("large queries", lambda call: call.distribution == "large_queries"),
    "zero keys": _of_append("zero keys", lambda call: call.distribution == "zero_keys"),
    "large values": _of_append("large values", lambda call: call.distribution == "small_keys_large_values"),
    "last position only": _of_append("last position", lambda call: call.last_only),
    "context": _of_append("a context", lambda call: call.context),
    "poison": step("a poisoning", lambda visit: isinstance(visit.step, Poison)),
    "refused call": step("a refused call", lambda visit: isinstance(visit.step, Reject)),
    "uncached forward": step("an uncached forward", lambda visit: isinstance(visit.step, UncachedForward)),
    "truncation": TRUNCATION,
    "fork": FORK,
    "reorder": REORDER,
    "reset": RESET,
    "sequences in turn": IN_TURN,
}
"""By flag, what a case has that has it."""


def flags(case: Case, claims: Claims) -> list[str]:
    """The flags of a case, and ``changed token`` where its programs differ in one."""
    walks = [walk(program, claims) for program in case.programs]
    found = [name for name, one in FLAGS.items() if one.reached(walks)]
    changed = any(getattr(call, "substitutions", ()) for program in case.programs for call in program.steps)
    return [*found, "changed token"] if changed and len(case.programs) > 1 else found
