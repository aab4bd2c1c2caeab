"""The parameters of a forward by purpose, and how to write calls with them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvconform_backends.targets.module.identifiers import (
    ADAPTERS,
    FLAGS,
    MASKS,
    OFFSETS,
    PAIRS,
    PASTS,
    POSITIONS,
    SELF_ATTENTION,
    SETTINGS,
    STATES,
)

STATES_LENGTH = 5
"""Tokens of the encoder states that stand for a context."""


@dataclass(frozen=True)
class ForwardSignature:
    """The parameters of a forward by purpose. ``settings``: required ones with one value in every call; ``unknown``:
    the others; ``unknown_required``: those of them without a default."""

    text: str
    inputs: tuple[str, ...]
    pasts: tuple[str, ...]
    flags: tuple[str, ...]
    masks: tuple[str, ...]
    positions: tuple[str, ...]
    contexts: tuple[str, ...]
    unknown: tuple[str, ...]
    unknown_required: tuple[str, ...]
    parameters: Mapping[str, inspect.Parameter]
    settings: Mapping[str, str]

    def required(self, name: str) -> bool:
        return self.parameters[name].default is inspect.Parameter.empty

    def default(self, name: str) -> Any:
        return self.parameters[name].default

    def annotation(self, name: str) -> str:
        noted = self.parameters[name].annotation
        return "" if noted is inspect.Parameter.empty else noted if isinstance(noted, str) else str(noted)


def signature_of(target: Any, name: str, past: str = "") -> ForwardSignature:
    """Classifies the parameters of a module's ``forward`` or of a function. Raises ValueError if it has none. ``past``:
    a parameter of any name that takes the past."""
    forward = getattr(target, "forward", target)
    found = inspect.signature(forward).parameters
    named = {k: p for k, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    text = f"{name}{'.forward' if forward is not target else ''}({', '.join(map(str, found.values()))})"
    if not named:
        raise ValueError(text)
    names = list(named)
    inputs = next((group for group in SELF_ATTENTION if set(group) <= set(names) and names[0] == group[0]), (names[0],))
    rest = [n for n in names if n not in inputs]
    flags = tuple(n for n in rest if n in FLAGS and _switch(named[n]))
    pair = next((p for p in PAIRS if set(p) <= set(rest)), ())
    pasts = (past,) if past else pair or tuple(n for n in rest if n in PASTS and n not in flags)[:1]
    masks = tuple(n for n in rest if n in MASKS and n not in pasts)
    positions = tuple(n for n in rest if n in OFFSETS | POSITIONS and n not in pasts)
    contexts = tuple(n for n in rest if n in ADAPTERS | STATES and n not in pasts)
    settings = {n: SETTINGS[n] for n in rest if n in SETTINGS and named[n].default is inspect.Parameter.empty}
    known = {*settings, *inputs, *flags, *pasts, *masks, *positions, *contexts}
    unknown = tuple(n for n in rest if n not in known)
    unknown_required = tuple(n for n in unknown if named[n].default is inspect.Parameter.empty)
    return ForwardSignature(
        text, inputs, pasts, flags, masks, positions, contexts, unknown, unknown_required, named, settings
    )


def _switch(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is a bool; a bare ``cache`` is not."""
    if isinstance(parameter.default, bool) or parameter.annotation in (bool, "bool"):
        return True
    return parameter.name not in PASTS and parameter.default in (None, inspect.Parameter.empty)


def position_forms(sig: ForwardSignature, name: str) -> tuple[str, ...]:
    """Values for a position parameter, the likeliest first."""
    number = "cached"
    row = "torch.arange(cached, cached + new, device=x.device)"
    grid = f"{row}.expand(batch, new)"
    noted = sig.annotation(name)
    if "int" in noted or isinstance(sig.default(name), int):
        return number, row, grid
    if "Tensor" in noted or name in ("cache_position", "cache_positions", "input_pos"):
        return row, grid, number
    return (number, row, grid) if name in OFFSETS else (grid, row, number)


def mask_forms(name: str) -> tuple[str, ...]:
    """Values for a mask parameter that cannot be omitted, or whose omission lets tokens see their future."""
    shape = "new, cached + new"
    seen = f"torch.ones({shape}, dtype=torch.bool, device=x.device).tril(cached)"
    added = f"torch.full(({shape}), -torch.inf, device=x.device).triu(cached + 1)"
    hidden = f"torch.ones({shape}, dtype=torch.bool, device=x.device).triu(cached + 1)"
    rows = ("torch.ones(batch, cached + new, dtype=torch.long, device=x.device)",) if name == "attention_mask" else ()
    square = (seen, added, hidden)
    return (*rows, *square, *(f"{form}[None, None]" for form in square))


def context_forms(sig: ForwardSignature, name: str, widths: Sequence[int], dtype: str) -> tuple[str, ...]:
    """Values for a parameter that takes the sequence's context, the likeliest first. Encoder states are random, others
    in each context, of one of these widths, in this dtype."""
    if name in ADAPTERS:
        row = "torch.full((batch,), context, device=x.device)"
        return ("context", row) if "Tensor" not in sig.annotation(name) else (row, "context")
    cast = "" if dtype == "torch.float32" else f".to({dtype})"
    drawn = f"torch.randn(1, {STATES_LENGTH}, {{}}, generator=torch.Generator().manual_seed(context)){cast}"
    states = [f"{drawn.format(width)}.to(x.device).expand(batch, -1, -1)" for width in widths]
    return tuple(
        form for state in states for form in ((f"({state},)", state) if name.endswith("outputs") else (state,))
    )


def settings(
    sig: ForwardSignature, contexts: Mapping[str, Sequence[str]], *, placed: bool = False
) -> Iterator[dict[str, str]]:
    """Ways to give masks, positions and contexts, the likeliest first: optional ones are omitted. A position with a
    numeric default must be given, since that default is correct for an empty cache only. placed: all positions are
    given. contexts: the forms of each required context."""
    wanted: list[list[tuple[str, str | None]]] = [[(name, form) for form in contexts[name]] for name in contexts]
    for name in sig.positions:
        given = placed or sig.required(name) or isinstance(sig.default(name), int)
        wanted.append([(name, form) for form in position_forms(sig, name)] if given else [(name, None)])
    for name in sig.masks:
        wanted.append([(name, None), *((name, form) for form in mask_forms(name))])
        if sig.required(name):
            wanted[-1][0] = (name, "None")
            if name == "attention_mask":
                wanted[-1].append(wanted[-1].pop(0))  # a required mask is rarely None
    for choice in _product(wanted):
        yield {name: form for name, form in choice if form is not None}


def _product(lists: list[list[tuple[str, str | None]]]) -> Iterator[tuple[tuple[str, str | None], ...]]:
    if not lists:
        yield ()
        return
    for head in lists[0]:
        for tail in _product(lists[1:]):
            yield (head, *tail)


def written(sig: ForwardSignature, given: Mapping[str, str], name: str = "module", inputs: str = "x") -> str:
    """The call in Python: inputs by position, other arguments by name."""
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    first = [f"{n}={inputs}" if sig.parameters[n].kind is keyword_only else inputs for n in sig.inputs]
    rest = []
    for n, form in {**given, **sig.settings}.items():
        positional = sig.parameters[n].kind is inspect.Parameter.POSITIONAL_ONLY
        rest.append(form if positional else f"{n}={form}")
    return f"{name}({', '.join(first + rest)})"


def extended(call: str, name: str, form: str) -> str:
    """The call with an additional argument."""
    return f"{call[:-1]}, {name}={form})"


def concrete(expression: str, numbers: Mapping[str, int | str], device: str = "cpu") -> str:
    """The expression with names replaced by their values at one step; the device is omitted on the CPU."""
    text = expression if device != "cpu" else re.sub(r", device=x\.device|\.to\(x\.device\)", "", expression)
    for name, value in numbers.items():
        text = re.sub(rf"(?<![\w.]){name}(?![\w=])", str(value), text)
    text = re.sub(r"\b(\d+) \+ (\d+)\b", lambda found: str(int(found[1]) + int(found[2])), text)
    return text
