"""What broken backends and black boxes look like: diagnosis, maps, and how a black box was called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvconform.explain.diagnosis import Diagnosis
from kvconform.results.results import Results
from kvconform_reports.view import maps
from kvconform_reports.view.outcomes import address, labels, short

DRAWN, TYPICAL = 6, "chunked"
"""Maps that differ and are drawn for one config, and the schedule that is drawn where none does; the others are told in
words."""


@dataclass(frozen=True)
class Picture:
    """One schedule: its drawing, and the same in words. ``right``: nothing differs from what must be."""

    svg: Markup | None
    words: str
    right: bool


@dataclass(frozen=True)
class Sight:
    """One backend under one config. ``link``: the real bug that it is like, and how it is called."""

    label: str
    config: str
    diagnosis: Diagnosis | None
    link: tuple[str, str] | None
    pictures: tuple[Picture, ...]


def sights(results: Sequence[Results]) -> tuple[Sight, ...]:
    """What is broken first, config by config."""
    found = []
    for label, result in zip(labels(results), results, strict=True):
        for config in dict.fromkeys((*result.diagnoses, *result.maps)):
            diagnosis = result.diagnoses.get(config)
            shown = result.maps.get(config, [])
            drawn = [one for one in shown if not one.right][:DRAWN]
            if not drawn:  # nothing differs: one of them shows what is seen
                drawn = [one for one in shown if one.schedule == TYPICAL] or shown[-1:]
            pictures = tuple(
                Picture(maps.drawing(one) if one in drawn else None, maps.words(one), one.right) for one in shown
            )
            bug = address(diagnosis.bug) if diagnosis is not None else ""
            found.append(Sight(label, config, diagnosis, (bug, short(bug)) if bug else None, pictures))
    return tuple(sorted(found, key=lambda sight: sight.diagnosis is None))


@dataclass(frozen=True)
class Truth:
    """What one backend was judged by. ``facts`` are of black boxes: how it was called, what was assumed, and so on."""

    word: str
    facts: tuple[tuple[str, str], ...]


def truth(result: Results) -> Truth:
    if result.target is None:
        return Truth("judged by the definition", ())
    facts = [("called as", result.target.recognised), *(("assumed", words) for words in result.target.assumed)]
    facts += [
        (f"noise floor, {config}", f"outputs may stray by {noise:.1g} of their size at most")
        for config, noise in result.target.noise.items()
    ]
    facts.append(("not seen", "what is wrong in its own forward and its cached steps alike (chapter definition)"))
    return Truth("judged by its own forward", tuple(facts))
