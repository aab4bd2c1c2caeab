"""What a runner must be able to do for a vector, and what vectors leave out because outputs do not show it."""

from __future__ import annotations

from typing import Any

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Clause
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Call,
    Fork,
    Generate,
    Marks,
    Poison,
    Program,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Truncate,
    UncachedForward,
    called,
)

FEATURES = {
    "steps": "appends to a cache; without them only generations are judged",
    "chunks": "appends of more than one token",
    "all positions": "an output for each new token, and not only for the last one",
    "two rows": "sequences of several rows, which grow together",
    "two sequences": "several open sequences",
    "ragged": "the rows of one append grow by different counts",
    "ragged at any time": "appends are ragged also on a sequence that holds tokens",
    "left padding": "columns without a token come first",
    "empty_append": "an append to an open sequence may have no column",
    "mask": "a mask hides tokens from all queries of an append",
    "last_only": "only the output of the last new token is requested",
    "contexts": "sequences have a context, whose vector is added to the embedding of each token",
    "uncached_forward": "a forward without a cache",
    "generate": "greedy generation",
    "truncate": "the last tokens of all rows are removed",
    "truncate_rows": "each row keeps a length of its own",
    "fork": "a sequence is copied",
    "reorder": "rows are permuted and repeated",
    "reset": "a sequence is emptied",
    "poison": "slots that hold no token are filled with a finite number",
    "poison-safe slots": "NaN and infinity in slots that hold no token have no effect",
    "refusal": "malformed appends are refused",
    "overflow refused": "appends beyond the capacity are refused",
}
"""Name and meaning. Most names are those of claims (``claims.ABILITIES``, ``claims.DERIVED``)."""
NOT_SHOWN = {
    "immutable": "a second name of one handle is no operation on data",
    "in_place": "where the present is written is not an operation on data",
    "limited rollback": "its programs depend on how far the implementation can roll back",
    "quantised cache": "expected values are those of a cache that keeps the config's dtype",
    "residual window": "expected values are those of a cache that keeps the config's dtype",
    "multiples of scales": "expected values are those of a cache that keeps the config's dtype",
    "bound on graphs": "it is about the number of graphs",
}
"""By need of a clause, why there are no vectors of it."""
NOT_DATA = {
    "layout.strides": "it is about the memory layout of inputs, and files have none",
    "memory.inputs-reused": "it is about the caller's memory",
}
"""By clause, the same."""


def left_out(clause: Clause) -> str:
    """Why there are no vectors of a clause; empty where there are."""
    if clause.name in NOT_DATA:
        return NOT_DATA[clause.name]
    for need in clause.needs:
        if need in NOT_SHOWN:
            return NOT_SHOWN[need]
    return "" if judged(clause) else "it is about the cache, memory or reported numbers, which outputs do not show"


def judged(clause: Clause) -> list[str]:
    """The names of a clause's relations that answers are judged by: those about outputs."""
    return [one.name for one in clause.relations if one.judges_outputs or one.name == "SHAPE"]


def features(program: Program) -> set[str]:
    """What a runner must be able to do to run a program. Raises ValueError for steps that are no operations on data."""
    found, state = set[str](), Marks()
    for step in program.steps:
        call = called(step)
        found |= _of(call, state)
        if isinstance(step, Reject):
            found.add("refusal" if step.wrong else "overflow refused" if isinstance(call, Append) else _name(call))
            continue
        state.apply(step)
        found |= {"two sequences"} if len(state.rows) > 1 else set()
    return found


def _of(call: Call, state: Marks) -> set[str]:
    match call:
        case Generate(counts=counts, context=context):
            return {"generate", *_rows(len(counts)), *_context(context)}
        case UncachedForward(counts=counts, context=context, last_only=last):
            return {"uncached_forward", *_rows(len(counts)), *_context(context), *({"last_only"} if last else ())}
        case Append():
            return _of_append(call, state.begun(call.seq))
        case Reorder(rows=rows):
            return {"reorder", *_rows(len(rows))}
        case Truncate(length=length):
            return {"truncate"} if isinstance(length, int) else {"truncate", "truncate_rows"}
        case Poison(keys=keys, values=values):
            return {"poison"} if {keys, values} <= {"none", "junk"} else {"poison", "poison-safe slots"}
        case Fork() | Reset():
            return {_name(call)}
        case AliasHandle() | ReadCache():
            raise ValueError(f"{_name(call)} is no operation on data")
    return set()


def _of_append(step: Append, begun: bool) -> set[str]:
    if step.layout != "contiguous" or step.in_place or step.count_macs or step.reused:
        raise ValueError(f"{step} is about memory or work")
    most, ragged = max(step.counts), len(set(step.counts)) > 1
    asked = {
        "steps": True,
        "chunks": most > 1,
        "all positions": most > 1 and not step.last_only,
        "ragged": ragged,
        "ragged at any time": ragged and begun,
        "left padding": ragged and step.pad is not None and step.pad[0] == "left",
        "empty_append": most == 0,
        "mask": bool(step.masked),
        "last_only": step.last_only,
    }
    return {name for name, holds in asked.items() if holds} | _rows(len(step.counts)) | _context(step.context)


def _rows(number: int) -> set[str]:
    return {"two rows"} if number > 1 else set()


def _context(number: int) -> set[str]:
    return {"contexts"} if number else set()


def _name(call: Call) -> str:
    return type(call).__name__.lower()


def unsupported(claims: Claims) -> dict[str, str]:
    """The features that a backend lacks by its claims, each with the reason. Where a claim is a number, the whole
    feature counts as lacking: a backend that takes two rows lacks ``two rows``, as vectors have three."""
    limits = {
        "steps": claims.interface != "steps" and "only generates",
        "chunks": claims.max_chunk is not None and f"takes {claims.max_chunk} tokens at once",
        "all positions": claims.returns != "all" and "gives the last output only",
        "two rows": claims.max_batch is not None and f"takes {claims.max_batch} rows",
        "two sequences": claims.max_sequences is not None and f"takes {claims.max_sequences} sequences",
        "truncate": claims.rollback is not None and f"undoes {claims.rollback} tokens",
    }
    lacking = {name: words for name, words in limits.items() if words}
    known = [name for name in FEATURES if name not in ("steps", "chunks", "all positions")]
    return {name: "is not claimed" for name in known if not claims.can(name)} | lacking


def without(claims: Claims, names: set[str]) -> Claims:
    """The claims less these features: what the answers of a runner are judged under."""
    body: dict[str, Any] = claims.to_json()
    body["abilities"] = [name for name in claims.abilities if name not in names]
    lesser: dict[str, dict[str, Any]] = {
        "overflow refused": {"overflow": "undefined"},
        "poison-safe slots": {"unused_slots": "finite"},
        "left padding": {"padding": ["right"]},
        "ragged at any time": {"ragged_appends": "first"},
        "chunks": {"max_chunk": 1},
        "two rows": {"max_batch": 1},
        "two sequences": {"max_sequences": 1},
        "steps": {"interface": "generation"},
    }
    for name in names & lesser.keys():
        body |= lesser[name]
    return Claims.from_json(body)
