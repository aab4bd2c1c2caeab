"""Which claims promise less than they did: of claims that are a choice, a limit or a list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kvconform_specs.claims import MANY_OF, Claims

WIDEST_FIRST = {
    "returns": ("all", "last"),
    "overflow": ("refused", "undefined"),
    "retention": ("all", "window"),
    "unused_slots": ("any", "finite"),
    "memory": ("length", "pages", "capacity"),
    "intermediates": ("single", "storage"),
    "reference": ("definition", "self"),
    "rounding": ("own", "shared"),
    "inputs": ("copied", "kept"),
    "too_deep": ("refused", "undefined"),
    "ragged_appends": ("any", "first"),
    "sees_nothing": ("zeros", "finite"),
    "interface": ("steps", "generation"),
}
"""The values of claims that are a choice, from the one that promises most to the one that promises least."""


class MovedClaim(NamedTuple):
    """A claim with another value than before. ``lost``: of a claim that is a list, what it no longer has."""

    name: str
    was: Any
    now: Any
    narrowed: bool
    lost: tuple[str, ...] = ()


NUMBERS = ("max_batch", "max_chunk", "max_sequences", "rollback", "max_graphs", "kv_bits", "residual")


def moved_claims(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[MovedClaim]:
    """The claims that changed. A claim that only gained entries of a list is not among them."""
    mine, its = ({**Claims().to_json(), **claims} for claims in (now, before))
    for name, was in its.items():
        value = mine.get(name)
        if name in MANY_OF:
            lost = tuple(item for item in _listed(was) if item not in _listed(value))
            if lost:
                yield MovedClaim(name, was, value, True, lost)
        elif value != was:
            yield MovedClaim(name, was, value, _narrower(name, value, was, mine))


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else ()


def _narrower(name: str, value: Any, was: Any, mine: Mapping[str, Any]) -> bool:
    """Whether a claim promises less than the one that it replaces. ``None`` means no limit."""
    if name in WIDEST_FIRST:
        order = WIDEST_FIRST[name]
        return value in order and was in order and order.index(value) > order.index(was)
    if name == "static_shapes":  # empty: any shape
        return bool(value) and not (was and set(map(str, _listed(was))) <= set(map(str, _listed(value))))
    if name in NUMBERS and not all(one is None or isinstance(one, int) for one in (value, was)):
        return False  # of another suite
    if name in ("max_batch", "max_chunk", "max_sequences", "rollback"):
        return value is not None and (was is None or value < was)
    if name == "max_graphs":  # a limit of the backend, not of its caller: more graphs promise less
        return was is not None and (value is None or value > was)
    if name == "kv_bits":  # 0: the cache is not quantised
        return bool(value and (not was or value < was))
    if name == "residual":
        return bool(mine["kv_bits"] != 0 and (value or 0) < (was or 0))
    if name == "cache_dtype":  # empty: that of the config
        return bool(was == "" and value)
    return False  # a different page size or quantiser promises neither more nor less
