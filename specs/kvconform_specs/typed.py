"""JSON values against the types of a dataclass's fields: a wrong one is one sentence, not an exception from inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvconform_specs.errors import SpecError


def take(data: object, at: str, known: set[str]) -> dict[str, Any]:
    """The fields of a JSON object. Raises SpecError if it is not an object or has an unknown field."""
    if not isinstance(data, dict):
        raise SpecError(at, f"want an object, got {type(data).__name__}")
    for name in data:
        if name not in known:
            raise SpecError(f"{at}.{name}", f"unknown field; known: {', '.join(sorted(known))}")
    return data


def checked(kind: type, values: Mapping[str, Any], at: str) -> None:
    """Raises SpecError if a field of a dataclass is missing or has a value of another type."""
    hints = _hints(kind)
    for one in fields(kind):
        if one.name in values:
            if not _fits(values[one.name], hints[one.name]):
                words = f"want {_named(hints[one.name])}, got {values[one.name]!r}"
                raise SpecError(f"{at}.{one.name}", words if len(words) < 200 else f"{words[:200]}…")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise SpecError(f"{at}.{one.name}", "is missing")


def tuples(value: Any) -> Any:
    """A value in which lists are tuples, as the fields of our dataclasses have them."""
    return tuple(tuples(item) for item in value) if isinstance(value, list | tuple) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (UnionType, Union):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[1:] == (...,):
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else origin or hint)


def _named(hint: Any) -> str:
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(map(_named, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        items = _named(inner[0]) if inner[1:] == (...,) else ", ".join(map(_named, inner))
        return f"a list of {items}" if inner[1:] == (...,) else f"[{items}]"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
