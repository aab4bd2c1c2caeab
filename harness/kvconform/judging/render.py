"""The one place that says a mismatch in words. Nothing reads what it says."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvconform.judging.mismatch import Kind, Mismatch, Place, Value


def render(mismatch: Mismatch) -> str:
    """One sentence: where it happened, what came and what had to come."""
    m = mismatch
    words = WORDS[m.kind](m)
    if m.step is not None:
        words = f"{_step(m)}{_token(m)}: {words}"
    elif m.kind in (Kind.DIED, Kind.TIMED_OUT):
        words = f"before the first step: {words}"
    if m.earlier_programs:
        programs = "1 earlier program" if m.earlier_programs == 1 else f"{m.earlier_programs} earlier programs"
        words += f" (only after {programs} in the same process: state leaked)"
    return words


# --- places ---
def _step(place: Place) -> str:
    return f"step {place.step} ({place.call})"


def _token(m: Mismatch) -> str:
    """``, row 0, position 7, head 3`` or ``, row 0, position 7, layer 1, key of KV head 0``, as far as it is known."""
    parts = [f"{name} {value}" for name, value in (("row", m.row), ("position", m.position)) if value is not None]
    if m.part in ("key", "value"):
        parts += [f"layer {m.layer}", f"{m.part} of KV head {m.head}"]
    elif m.part == "head":
        parts.append(f"head {m.head}")
    elif m.part in ("logit", "channel"):
        parts.append(f"{m.part} {m.element}")
    return "".join(f", {part}" for part in parts)


# --- numbers ---
def _number(value: Value | None, digits: int = 6) -> str:
    assert isinstance(value, int | float | str)  # as text it is nan or an infinity
    return f"{float(value):.{digits}g}"


def _numbers(value: Value | None) -> list[int]:
    assert isinstance(value, tuple)
    return list(value)


def _range(m: Mismatch) -> str:
    return f"{m.want}" if m.want_max in (None, m.want) else f"{m.want} to {m.want_max}"


def _excess(m: Mismatch) -> str:
    """`` ± 7.4e-07 (29340x the bound)``; without the factor where there is none."""
    assert isinstance(m.got, float | str) and isinstance(m.want, float | str) and m.bound is not None
    bound = float(m.bound)
    factor = abs(float(m.got) - float(m.want)) / bound if bound else math.inf
    return f" ± {bound:.2g}" + (f" ({factor:.3g}x the bound)" if math.isfinite(factor) else "")


# --- sentences ---
def _parity(m: Mismatch) -> str:
    return f"got {_number(m.got)}, want {_number(m.want)}{_excess(m)}"


def _agreement(m: Mismatch) -> str:
    there = "" if m.other is None else _step(m.other)
    return f"got {_number(m.got)}, but {_number(m.want)} in {there} of the program it must agree with,{_excess(m)}"


def _bitwise(m: Mismatch) -> str:
    there = "" if m.other is None else _step(m.other)
    return f"got {_number(m.got, 9)}, but {_number(m.want, 9)} in {there}, and must be the same bit for bit"


def _change(m: Mismatch) -> str:
    if m.change == "token":
        return f"changing the token at row {m.changed_row}, position {m.changed_position}"
    return CHANGES.get(m.change, "the change")


CHANGES = {
    "padding": "what fills the columns without a token",
    "nan": "the NaN of other tokens",
    "reused": "what the caller writes over the inputs of earlier steps",
}


def _insensitive(m: Mismatch) -> str:
    moved = f"the output moved from {_number(m.want, 9)} to {_number(m.got, 9)}"
    return f"{_change(m)} must not be seen here, but {moved}"


def _sensitive(m: Mismatch) -> str:
    by = f"{_number(m.want)} ± {_number(m.bound, 2)}"
    return f"{_change(m)} must move the output by {by}, but it moved by {_number(m.got)}"


def _same_token(m: Mismatch) -> str:
    return f"is the largest, but it must be logit {m.want} by a lead of {_number(m.lead, 3)}"


def _generated(m: Mismatch) -> str:
    lead = f"{_number(m.lead, 3)} ± {_number(m.bound, 2)}"
    return f"got token {m.got}, want {m.want}, whose logit leads by {lead}"


def _contents(m: Mismatch) -> str:
    within = f" ± {_number(m.bound, 2)}" if m.bound else ""
    return f"holds {_number(m.got)}, want {_number(m.want)}{within}"


def _quantised(m: Mismatch) -> str:
    nearest = f"{_number(m.want, 9)} ± {_number(m.bound, 2)}"
    return f"holds {_number(m.got, 9)}, want a multiple of its head's step, such as {nearest}"


def _stable_contents(m: Mismatch) -> str:
    since = "" if m.other is None else f" at step {m.other.step}"
    return f"holds {_number(m.got, 9)}, and held {_number(m.want, 9)}{since}"


def _inputs(m: Mismatch) -> str:
    who = "a later step " if m.later else ""
    if m.where == "inside":
        return (
            f"{who}overwrote number {list(m.index)} of its input {m.array}: was {_number(m.want)}, is {_number(m.got)}"
        )
    if m.where == "between":
        return f"{who}wrote between the numbers of its input {m.array}, which is a view of a larger array"
    first = {"before": "before the first", "behind": "behind the last"}[m.where]
    given = f"{who}wrote into memory that it was not given"
    return f"{given}: number {m.distance} {first} of its input {m.array}"


def _outputs(m: Mismatch) -> str:
    words = f"number {list(m.index)} of the output was overwritten after it was returned"
    return f"{words}: was {_number(m.want)}, is {_number(m.got)} at the end of the program"


def _positions(m: Mismatch) -> str:
    assert isinstance(m.got, int) and m.want_max is not None and m.new_tokens is not None
    as_for = f"{m.got / m.want_max * m.new_tokens:.3g}" if m.got > m.want_max else ""
    extra = f", as for {as_for} new tokens" if as_for else ""
    tokens = f"{m.new_tokens} new tokens of {m.depths[0]}"
    return f"took {m.got} multiply-adds for {tokens}, want {m.want} to {m.want_max}{extra}"


def _linear_cost(m: Mismatch) -> str:
    works, depths = (", ".join(map(str, numbers)) for numbers in (_numbers(m.got), m.depths))
    took = f"took {works} multiply-adds at the depths {depths}"
    return f"equal steps {took}: not a line of slope {m.want_max} at most"


def _shape(m: Mismatch) -> str:
    if m.part == "read":
        return f"shows {_numbers(m.got)[0]} numbers for each token, want {_numbers(m.want)[0]}"
    return f"{_array(m)} the shape {m.got}, want {m.want}"


def _array(m: Mismatch) -> str:
    return "the output has" if m.part == "output" else "the generated token ids have"


# --- serving engines ---
REFERENCES = {
    "cold": "alone and without the prefix cache",
    "prefill": "where the text up to it is the prompt",
    "repeated": "when asked again",
    "model": "by the model without an engine",
}


def _log_probability(m: Mismatch) -> str:
    of = "of the prompt's own token" if m.part == "prompt" else "of token"
    digits = 6 if m.bound else 9
    want = f"{_number(m.want, digits)} {REFERENCES[m.reference]}"
    bound = f",{_excess(m)}" if m.bound else ", and must be the same bit for bit"
    return f"the log-probability {of} {m.token} is {_number(m.got, digits)}, but {want}{bound}"


def _choice(m: Mismatch) -> str:
    lead = f"whose log-probability leads by at least {_number(m.lead, 3)}"
    return f"token {m.got} was generated, but {m.want} {REFERENCES[m.reference]}, {lead} ± {_number(m.bound, 2)}"


COUNTED = {
    "cached": "cached tokens",
    "prompt": "prompt tokens",
    "generated": "generated tokens",
    "completions": "completions",
    "scored": "scored prompt tokens",
}


def _count(m: Mismatch) -> str:
    want = f"at most {m.want_max}" if m.want is None else f"{m.want}"
    shared = ", which its prompt shares with what was asked before" if m.counted == "cached" else ""
    return f"the answer has {m.got} {COUNTED[m.counted]}, want {want}{shared}"


WORDS: dict[Kind, Callable[[Mismatch], str]] = {
    Kind.PARITY: _parity,
    Kind.AGREEMENT: _agreement,
    Kind.BITWISE: _bitwise,
    Kind.INSENSITIVE: _insensitive,
    Kind.SENSITIVE: _sensitive,
    Kind.FINITE: lambda m: f"got {_number(m.got)} from finite inputs",
    Kind.SAME_TOKEN: _same_token,
    Kind.GENERATED: _generated,
    Kind.LENGTHS: lambda m: f"reports that its rows hold {_numbers(m.got)} tokens, want {_numbers(m.want)}",
    Kind.FREE_SLOTS: lambda m: f"reports that its rows take {_numbers(m.got)} more tokens, want {_numbers(m.want)}",
    Kind.CONTENTS: _contents,
    Kind.QUANTISED: _quantised,
    Kind.STABLE_CONTENTS: _stable_contents,
    Kind.RETAINED_COUNT: lambda m: f"shows {m.got} tokens, want {_range(m)}",
    Kind.INPUTS: _inputs,
    Kind.OUTPUTS: _outputs,
    Kind.GRAPH_COUNT: lambda m: f"has compiled {m.got} graphs, but claims at most {m.want_max}",
    Kind.BYTES: lambda m: f"reports that it takes {m.got} bytes, want {_range(m)}",
    Kind.POSITIONS: _positions,
    Kind.LINEAR_COST: _linear_cost,
    Kind.LOG_PROBABILITY: _log_probability,
    Kind.CHOICE: _choice,
    Kind.COUNT: _count,
    Kind.REFUSED: lambda m: f"was refused, though it is served alone: {'' if m.error is None else m.error.message}",
    Kind.NO_ANSWER: lambda m: f"the engine gave no answer: {m.error or m.ended}",
    Kind.SERVED: lambda m: "was served, though prompt and answer exceed the context",
    Kind.RAISED: lambda m: f"raised {m.error}",
    Kind.ACCEPTED: lambda m: "was accepted, but must be refused",
    Kind.NO_OUTPUT: lambda m: "gave no output",
    Kind.NOT_NUMERIC: lambda m: f"gave {m.got}, want an array of numbers",
    Kind.SHAPE: _shape,
    Kind.DTYPE: lambda m: f"{_array(m)} the dtype {m.got}, want {m.want}",
    Kind.TOKEN_ID: lambda m: f"generated token {m.got}, want ids of {m.want} to {m.want_max}",
    Kind.DIED: lambda m: f"{m.ended}",
    Kind.TIMED_OUT: lambda m: f"{m.ended}",
    Kind.NOT_BUILT: lambda m: f"could not be built: {m.error or m.ended}",
    Kind.REFERENCE_FAILED: lambda m: f"its own uncached forward failed: {m.error or m.ended}",
    Kind.WORKER_FAILED: lambda m: f"the worker failed: {m.error or m.ended}",
}
