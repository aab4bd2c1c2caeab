"""The relations about the caller's memory: inputs and what lies around them, and outputs that were returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvconform.judging.mismatch import Kind, json_number
from kvconform.judging.observed import Checked, Observed
from kvconform.worker.caller_memory import Overwritten
from kvconform_specs.program import Append, UncachedForward, called


def inputs(observed: Sequence[Observed]) -> Checked:
    """Counts tokens that were handed over."""
    compared = 0
    for one in observed:
        for number, (step, done) in enumerate(zip(one.program.steps, one.trace, strict=False)):
            call = called(step)
            if isinstance(call, Append | UncachedForward):
                compared += sum(call.counts)
            if done.input_changed is not None:
                return Checked(one.at_step(Kind.INPUTS, number, **_facts(done.input_changed)), compared)
    return Checked(None, compared)


def outputs(observed: Sequence[Observed]) -> Checked:
    """Counts outputs that another step followed."""
    compared = 0
    for one in observed:
        for number, done in enumerate(one.trace):
            compared += done.output is not None and number + 1 < len(one.trace)
            if done.output_changed is not None:
                return Checked(one.at_step(Kind.OUTPUTS, number, **_facts(done.output_changed)), compared)
    return Checked(None, compared)


def _facts(changed: Overwritten) -> dict[str, Any]:
    facts: dict[str, Any] = {"array": changed.array, "where": changed.where, "later": changed.later}
    if changed.where == "inside":
        numbers = {"got": json_number(changed.now), "want": json_number(changed.was)}
        return {**facts, "index": changed.index, **numbers}
    return {**facts, "distance": changed.distance or None}
