"""The page of the public API, ``docs/api.md``, from the docstrings of what ``kvconform`` exports."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from enum import Enum

import kvconform

GROUPS = {
    "Run the suite": ("conformance",),
    "Write an adapter": ("Backend", "BlackBox", "Claims", "Config"),
    "Read results": ("Results", "Verdict", "Outcome", "Mismatch"),
}
"""The names of each section; all other exports are errors."""


def render() -> str:
    named = [name for names in GROUPS.values() for name in names]
    groups = {**GROUPS, "Errors": tuple(name for name in kvconform.__all__ if name not in named)}
    lines = ["# API", "", "Everything here is imported from `kvconform`. `nox -s regenerate` writes this page."]
    for title, names in groups.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", *_entry(name, getattr(kvconform, name))]
    return "\n".join(lines) + "\n"


def _entry(name: str, value: object) -> Iterator[str]:
    bases = [base.__name__ for base in getattr(value, "__bases__", ()) if base.__name__ in kvconform.__all__]
    yield f"### `{name}`" + (f" ({', '.join(f'`{base}`' for base in bases)})" if bases else "")
    if inspect.isfunction(value):
        yield from ("", "```python", f"{name}{_signature(value)}", "```")
    yield from ("", _markdown(inspect.getdoc(value) or ""))
    if not inspect.isclass(value):
        return
    if issubclass(value, Enum):
        yield from ("", "Members: " + ", ".join(f"`{member.name}`" for member in value) + ".")
        return
    members = [
        (member, one)
        for member, one in vars(value).items()
        if not member.startswith("_") and (callable(one) or isinstance(one, property | classmethod))
    ]
    if members:
        yield ""
    for member, one in members:
        what = one.__func__ if isinstance(one, classmethod) else one
        signature = _signature(what) if inspect.isfunction(what) else ""
        first, _, _more = _markdown(inspect.getdoc(what) or "").partition("\n\n")
        yield f"- `{member}{signature}`: {' '.join(first.split())}"


class _Verbatim(str):
    """Text that ``inspect`` prints without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(function: Callable[..., object]) -> str:
    signature = inspect.signature(function)
    parameters = [
        one.replace(
            annotation=one.annotation if one.annotation is one.empty else _Verbatim(one.annotation),
            default=_Verbatim("sys.executable") if one.default == sys.executable else one.default,
        )
        for one in signature.parameters.values()
        if one.name not in ("self", "cls")
    ]
    return str(signature.replace(parameters=parameters, return_annotation=_Verbatim(signature.return_annotation)))


def _markdown(docstring: str) -> str:
    """A docstring with code as in Markdown. Blocks behind ``::`` become fenced code."""
    text = re.sub(r"``([^`]+)``", r"`\1`", docstring)
    block = re.compile(r"::\n\n((?:    .*\n?|\n)+)")
    return block.sub(lambda found: f":\n\n```python\n{inspect.cleandoc(found[1])}\n```\n", text)
