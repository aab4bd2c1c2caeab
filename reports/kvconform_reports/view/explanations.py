"""Diagnoses and maps of broken backends and black boxes, and how a black box was called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvconform.explain.diagnosis.text import sentence
from kvconform.results.results import Results
from kvconform.results.serving import Served
from kvconform_reports.view import maps
from kvconform_reports.view.outcomes import address, labels, short

DRAWN, TYPICAL = 6, "chunked"
"""How many maps that differ are drawn for one config, and the schedule that is drawn where none does; the others are
described in words."""


@dataclass(frozen=True)
class Picture:
    """One schedule: its drawing, and the same in words."""

    svg: Markup | None
    words: str


@dataclass(frozen=True)
class ExplainedConfig:
    """One backend under one config. ``diagnosis``: the sentence, or nothing. ``link``: a similar bug, and its name."""

    label: str
    config: str
    diagnosis: str
    link: tuple[str, str] | None
    pictures: tuple[Picture, ...]


def explanations(results: Sequence[Results]) -> tuple[ExplainedConfig, ...]:
    """What has a diagnosis first, config by config."""
    found = []
    for label, result in zip(labels(results), results, strict=True):
        for config in dict.fromkeys((*result.diagnoses, *result.maps)):
            diagnosis = result.diagnoses.get(config)
            shown = result.maps.get(config, [])
            drawn = [one for one in shown if not one.right][:DRAWN]
            if not drawn:  # nothing differs: one of them is an example
                drawn = [one for one in shown if one.schedule == TYPICAL] or shown[-1:]
            pictures = tuple(Picture(maps.drawing(one) if one in drawn else None, maps.words(one)) for one in shown)
            bug = address(diagnosis.bug) if diagnosis is not None else ""
            words = sentence(diagnosis) if diagnosis is not None else ""
            found.append(ExplainedConfig(label, config, words, (bug, short(bug)) if bug else None, pictures))
    return tuple(sorted(found, key=lambda one: not one.diagnosis))


@dataclass(frozen=True)
class JudgedBy:
    """What one backend was judged by. ``facts``, of a black box: how it was called, what was assumed, and so on."""

    word: str
    facts: tuple[tuple[str, str], ...]


def _engine(found: Served) -> Iterator[tuple[str, str]]:
    """What is known of a serving engine, and what its numbers are worth."""
    yield "engine", f"{found.engine} {found.version}, model {found.model}, dtype {found.dtype or 'unknown'}"
    yield from (("assumed", words) for words in found.assumed)
    yield "requests", f"{found.requests}, {found.hits} of them from the cache; {found.preemptions} preemptions"
    if found.changes:
        yield "noise", f"{found.noise:.2g} between decode and prefill without the cache, floor {found.floor:.2g}"
        effect = f"{found.effect:.2g} or more, in {found.seen} of {found.changes} tries"
        yield "effect of one wrong token", effect
        yield "bound", f"{found.bound:.2g}" if found.bound else "none: a wrong token cannot be told from rounding"
    if found.reference:
        yield "second reference", f"{found.reference} without an engine"
        yield "its bound", f"{found.reference_bound:.2g}; one wrong token makes {found.reference_effect:.2g} or more"
    for one in found.seconds_to_first:
        times = f"cold {1e3 * one.cold:.3g} ms, warm {1e3 * one.warm:.3g} ms with {one.cached} tokens cached"
        ratio = f"{one.ratio:.3g} times as fast (95 % interval {one.low:.3g} to {one.high:.3g}, {one.pairs} pairs)"
        yield f"time to the first token, {one.length} tokens", f"{times}: {ratio}"


def judged_by(result: Results) -> JudgedBy:
    if result.served is not None:
        both = " and by the model that it serves" if result.served.reference else ""
        return JudgedBy(f"judged by its own answers without the prefix cache{both}", tuple(_engine(result.served)))
    if result.target is None:
        alone = ", its generations alone" if result.claims.get("interface") == "generation" else ""
        return JudgedBy(f"judged by the definition{alone}", ())
    facts = [("called as", result.target.recognised), *(("assumed", words) for words in result.target.assumed)]
    facts += [
        (
            f"noise floor, {config}",
            f"rounding may change an output by up to {noise:.1g} of the outputs' root mean square",
        )
        for config, noise in result.target.noise.items()
    ]
    if result.target.held is not None and result.target.held.sentence:
        facts.append(("memory", result.target.held.sentence))
    facts.append(("not detected", "mistakes that its uncached forward and its cached steps share (chapter definition)"))
    return JudgedBy("judged by its own uncached forward", tuple(facts))
