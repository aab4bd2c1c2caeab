"""The cases of a preset, before anybody is admitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvconform.bench.presets import Preset
from kvconform.bench.record import CEILINGS


@dataclass(frozen=True)
class Plan:
    """A case before anybody is admitted: which phases, and whether only the reference and the published design do it,
    since it takes long."""

    phases: tuple[str, ...]
    depth: int
    batch: int = 1
    new: int = 0
    few: bool = False


def plans(preset: Preset, phases: Sequence[str] = ()) -> list[Plan]:
    """The cases of a preset, in the order in which they are run."""
    found = []
    for batch in preset.batches:
        found += [Plan(("decode", *CEILINGS), n, batch) for n in preset.depths]
        found += [Plan(("prefill",), n, batch) for n in preset.prompts]
        if preset.generate is not None:
            found.append(Plan(("generate",), preset.generate[0], batch, preset.generate[1]))
    found += [Plan(("decode", "recompute", "recompute-last"), n) for n in preset.depths]
    if preset.generate is not None:
        loops = ("generate", "regenerate", "regenerate-last")
        found.append(Plan(loops, preset.generate[0], 1, preset.generate[1], few=True))
    return [plan for plan in found if not phases or _asked(plan, phases)]


def _asked(plan: Plan, phases: Sequence[str]) -> bool:
    """Cases that compare a cached phase with uncached ones are asked for by the uncached."""
    first, *others = (phase for phase in plan.phases if phase not in CEILINGS)
    return any(phase in phases for phase in others) if others else first in phases


STEPS_OF = {"generate": ("prefill", "decode"), "regenerate": ("recompute",), "regenerate-last": ("recompute-last",)}
"""The steps of which a generation is made."""


def steps(cases: Iterable[Plan]) -> list[tuple[str, int, int]]:
    """Each phase of a single step that these cases need, its depth and its batch, once."""
    found = [
        (step, plan.depth, plan.batch)
        for plan in cases
        for phase in plan.phases
        if phase not in CEILINGS
        for step in STEPS_OF.get(phase, (phase,))
    ]
    return list(dict.fromkeys(found))
