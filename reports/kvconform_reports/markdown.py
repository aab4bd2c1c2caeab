"""The results as GitHub Markdown: a job summary that fits on a screen."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from kvconform.bench.record import Record
from kvconform.explain.diagnosis.text import sentence
from kvconform.judging.every_clause import CHAPTERS
from kvconform.judging.verdict import Outcome
from kvconform.mutation import record as audit_record
from kvconform.results.results import Results
from kvconform.run.cross_backend import Pair
from kvconform_reports.terminal import printable
from kvconform_reports.view import speed
from kvconform_reports.view.mutation import mutation
from kvconform_reports.view.null_models import power
from kvconform_reports.view.outcomes import SYMBOLS, Chip, chips, counted, duration, labels, standing
from kvconform_reports.view.shared_causes import causes
from kvconform_reports.view.tables import Guarantee, failures, guarantees, known
from kvconform_specs.serving import clauses as serving

MOST_FAILURES, MOST_CAUSES = 50, 8  # GitHub limits a summary to 1 MiB; the report has all


def render(
    results: Sequence[Results],
    pairs: Sequence[Pair],
    latency: Record | None,
    *,
    folder: str = "results",
    audit: audit_record.AuditRecord | None = None,
) -> str:
    """Verdicts, chapters by backend, failures with replay commands, known failures, guarantees, the worst pair, speed,
    power and mutation score."""
    parts = [
        _verdicts(results),
        _chapters(results),
        _failures(results, folder),
        _known(results, folder),
        _guarantees(results),
        _pairs(pairs),
        _speed(latency),
        _power(results),
        _audit(audit),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdicts(results: Sequence[Results]) -> str:
    lines = ["## kvconform", ""]
    for label, result in zip(labels(results), results, strict=True):
        stands = standing(result)
        programs = sum(verdict.programs for verdict in result.verdicts)
        structures = sum(verdict.structures for verdict in result.verdicts)
        judged = (
            f" ({counted(len(result.verdicts), 'cell')}, {counted(programs, 'program')} of "
            f"{counted(structures, 'structure')}, {duration(result.seconds)})"
            if result.verdicts
            else ""
        )
        words = " ".join((f"{text(stands.sentence)}{judged}.", *map(text, stands.notes)))
        lines.append(f"- {stands.symbol} **{text(label)}** {stands.word}: {words}")
        lines += [f"  - {SYMBOLS[Outcome.FAIL]} **stale known failure** {text(words)}" for words in stands.stale]
    return "\n".join(lines if results else [*lines, "No results were given."])


def _chapters(results: Sequence[Results]) -> str:
    if not any(result.verdicts for result in results):
        return ""
    given = {v.clause.partition(".")[0] for r in results for v in r.verdicts}
    asked = {result.served is not None for result in results}  # of engines, of backends
    known = [chapter for chapter in CHAPTERS if (chapter == serving.CHAPTER) in asked]
    found = dict.fromkeys((*known, *sorted(given)))
    lines = [f"| chapter | {' | '.join(text(label) for label in labels(results))} |", f"|---|{'---|' * len(results)}"]
    for chapter in found:
        cells = [
            _cell(chips(v.outcome for v in result.verdicts if v.clause.partition(".")[0] == chapter))
            for result in results
        ]
        lines.append(f"| {text(chapter)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Sequence[Chip]) -> str:
    words = []
    for chip in found:
        word = f"{chip.symbol} {chip.word} {chip.count}"
        words.append(f"**{word}**" if chip.tone == "f" else word)
    return "<br>".join(words) or "not run"


def _failures(results: Sequence[Results], folder: str) -> str:
    found = failures(results, folder)
    if not found:
        return ""
    lines = ["### Failures", ""]
    for cause in causes(results, found)[:MOST_CAUSES]:
        places = f"{len(cause.failures)} cells on {', '.join(map(text, cause.backends))}"
        lines.append(f"- shared by {places}: {text(cause.words)}")
    for failure in found[:MOST_FAILURES]:
        v = failure.verdict
        where = f"**{text(v.clause)}** on {text(failure.label)} under {text(v.config)}"
        lines.append(f"- {failure.chip.symbol} {failure.chip.word}: {where}: {text(v.sentence)}")
        if v.steps:
            lines.append(f"  <br>steps: {text(v.steps)}")
        if failure.replay:
            lines.append(f"  <br>replay: {code(failure.replay)}")
    if len(found) > MOST_FAILURES:
        lines.append(f"- and {len(found) - MOST_FAILURES} more: the report has them all")
    for label, result in zip(labels(results), results, strict=True):
        for config, diagnosis in result.diagnoses.items():
            lines.append(f"- **{text(label)}** under {text(config)}: {text(sentence(diagnosis))}")
    return "\n".join(lines)


def _known(results: Sequence[Results], folder: str) -> str:
    found = known(results, folder)
    if not found:
        return ""
    lines = ["### Known failures", ""]
    for one in found[:MOST_FAILURES]:
        where = f"{SYMBOLS[Outcome.KNOWN_FAILURE]} **{text(one.clause)}** on {text(one.label)} under {text(one.config)}"
        why = f"{one.row.reason}, until {one.row.expires} ({one.link}): " if one.row else ""
        lines.append(f"- {where}: {text(why + one.now)}")
        if one.steps:
            lines.append(f"  <br>steps: {text(one.steps)}")
        if one.replay:
            lines.append(f"  <br>replay: {code(one.replay)}")
    if len(found) > MOST_FAILURES:
        lines.append(f"- and {len(found) - MOST_FAILURES} more: the report has them all")
    return "\n".join(lines)


def _guarantees(results: Sequence[Results]) -> str:
    """The strongest level of each backend under each config, and the refuted one."""
    found = guarantees(results, "")
    if not found:
        return ""
    lines = [
        "### Guarantees",
        "",
        f"| config | {' | '.join(text(label) for label in labels(results))} |",
        f"|---|{'---|' * len(results)}",
    ]
    for config, cells in found:
        words = [_guarantee(cell) if cell else "not measured" for cell in cells]
        lines.append(f"| {text(config)} | {' | '.join(words)} |")
    return "\n".join(lines)


def _guarantee(cell: Guarantee) -> str:
    if not cell.refuted:
        return text(cell.level) or "not decided"
    return f"{text(cell.level) or 'none'}<br>{SYMBOLS[Outcome.REFUTED]} {text(cell.refuted)}: refuted"


def _pairs(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    worst = max(pairs, key=lambda pair: pair.ratio)
    return (
        f"Largest difference between two backends: {worst.ratio:.3g} of the sum of their bounds ({text(worst.one)} and "
        f"{text(worst.other)} under {text(worst.config)})."
    )


def _speed(latency: Record | None) -> str:
    """For each preset and batch a sentence and a table, published figures, and backends without a time."""
    if latency is None:
        return ""
    lines = ["### Speed", ""]
    for section in speed.sections(latency):
        for group in section.groups:
            lines += _answer(group, f"{section.preset}, batch {group.batch}")
        lines += _published(section)
        for one in section.excluded:
            who = " ".join(part for part in (one.backend, one.phase) if part)
            lines.append(f"- {text(section.preset)}: no time for {text(who)}: {text(one.why)}")
        lines += [""] if lines[-1] else []
    if not latency.finished:
        lines += ["This speed run did not finish.", ""]
    return "\n".join(lines[:-1]) if len(lines) > 2 else ""


def _answer(group: speed.Group, where: str) -> list[str]:
    if group.answer is None:
        return [f"**{text(where)}**: no decode step has a time.", ""]
    heads = (
        "backend",
        f"{group.unit.name} per {'token' if group.batch == 1 else 'step'}",
        "ratio to the reference",
        "cached / recomputed, all positions",
        "cached / recomputed, last position",
        "of the roofline",
    )
    lines = [f"**{text(where)}**: {text(group.answer.sentence)}", "", f"| {' | '.join(heads)} |"]
    lines.append("|---" * len(heads) + "|")
    for row in group.answer.rows:
        timing = row.timing
        time = f"{timing.median} ({timing.interval})" if timing.interval else timing.median
        to = ", ".join(p.words for p in timing.to) or "–"
        cells = (timing.backend, time, to, row.every.words, row.last.words, row.roof.words)
        lines.append(f"| {' | '.join(map(text, cells))} |")
    return [*lines, ""]


def _published(section: speed.Section) -> list[str]:
    """The ratio without / with the cache: as published, and as measured."""
    if section.published is None:
        return []
    found = [f"published {one.ratio or 'without a ratio'} ({one.source})" for one in section.published.published]
    for one in section.published.measured:
        found.append(f"{one.kind} by {one.backend} {one.every.words}, last position alone {one.last.words}")
    found += [section.published.missing] if section.published.missing else []
    return [f"- {text(section.preset)}, time without the cache over time with it: {text('; '.join(found))}"]


def _power(results: Sequence[Results]) -> str:
    """For each power table the share rejected and the weakest pairs."""
    found = power(results)
    if found is None:
        return ""
    lines = [f"- {text(dtype)}: {text(' '.join(words[:2]))}" for dtype, words in found.summaries]
    return "\n".join(("### Power of the clauses", "", *lines))


def _audit(record: audit_record.AuditRecord | None) -> str:
    if record is None:
        return ""
    words = [*mutation(record).notes, *audit_record.summary(record)]
    lines = ["### Mutation score", "", *(f"- {text(line)}" for line in words[:MOST_FAILURES])]
    if len(words) > MOST_FAILURES:
        lines.append(f"- and {len(words) - MOST_FAILURES} more: the report has them all")
    return "\n".join(lines)


def text(words: str) -> str:
    """Escaped text: no tag, table cell, emphasis, link, mention or line break results from it."""
    escaped = re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", html.escape(printable(words), quote=False))
    return escaped.replace("@", "&#64;").replace("://", "&#58;//")


def code(words: str) -> str:
    """Text in a code element, with Markdown characters as entities."""
    entities = (f"&#{ord(c)};" if c in "\\`*_{}[]|~#!@:<>&" else c for c in printable(words))
    return f"<code>{''.join(entities)}</code>"
