"""Probes: short programs that a broken backend is asked to run, so that its mistake can be described.

All backends get the same probes, as far as their claims and the config allow. Each probe has its own streams: a token
that one probe leaves behind occurs in no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

from kvconform.explain.diagnosis.battery import BATTERY
from kvconform_specs.claimed import claimed
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Program
from kvconform_specs.static_shapes import in_static_shapes

STREAMS = 1000
"""How many streams each probe has."""


@dataclass(frozen=True)
class Probe:
    """One program, and what it does in words."""

    name: str
    words: str
    program: Program


def probes(config: Config, claims: Claims) -> Iterator[Probe]:
    """The probes that the config has room for and the claims allow."""
    for plan in BATTERY:
        if config.profile not in plan.profiles or (plan.windowed and config.window is None):
            continue
        if plan.contexts and config.contexts == 1:
            continue
        if not all(claims.can(need) for need in plan.needs):
            continue
        steps = tuple(plan.steps(config, claims, first_stream(plan.name)))
        try:
            program = in_static_shapes(Program(config, steps), claims)
        except SpecError:  # it exceeds the capacity
            continue
        if steps and claimed(program.steps, claims):
            yield Probe(plan.name, plan.words, program)


def first_stream(name: str) -> int:
    """The first of a probe's streams. It depends on the name alone, so that a new probe changes no other."""
    return crc32(name.encode()) * STREAMS
