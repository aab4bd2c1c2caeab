"""The report: one self-contained HTML file that runs no third-party code and is readable without JavaScript."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvconform.bench.record import Record
from kvconform.judging.every_clause import BY_NAME
from kvconform.mutation import record as audit_record
from kvconform.results.results import Results
from kvconform.run.cross_backend import Pair
from kvconform_reports.view import (
    embedding,
    explanations,
    maps,
    matrix,
    mutation,
    null_models,
    outcomes,
    shared_causes,
    speed,
    tables,
)
from kvconform_reports.view.moved import Moved


def render(
    results: Sequence[Results],
    pairs: Sequence[Pair],
    latency: Record | None,
    *,
    folder: str = "results",
    audit: audit_record.AuditRecord | None = None,
    moved: Moved | None = None,
) -> str:
    """The report of one or more backends as HTML. ``folder``: the results folder in replay commands; ``moved``: what
    moved since an earlier run."""
    templates = _templates()
    style, script = (_source(templates, name) for name in ("style.css", "script.js"))
    data, packed = embedding.embed(results, pairs, latency, audit)
    rows, failures = tables.backends(results), tables.failures(results, folder)
    return templates.get_template("report.html").render(
        policy=policy(style, script),
        style=style,
        script=script,
        data=data,
        packed=packed,
        headline=headline(rows),
        moved=moved,
        runs=_runs(results),
        backends=rows,
        chapters=matrix.chapters(results),
        legend=matrix.legend(results),
        failures=failures,
        causes=shared_causes.causes(results, failures),
        known=tables.known(results, folder),
        levels=tables.levels(results),
        explanations=explanations.explanations(results),
        legend_of_maps=maps.legend(),
        guarantees=tables.guarantees(results, folder),
        reasons=tables.reasons(results),
        errors=tables.errors(results),
        pairwise=tables.pairwise(pairs),
        power=null_models.power(results),
        mutation=mutation.mutation(audit, {result.suite for result in results}) if audit else None,
        latency=latency,
        presets=speed.sections(latency) if latency else (),
        latency_facts=_latency_facts(latency),
        software=_software(latency),
        runtime_info=tables.runtime_info(results),
        environment=tables.environments(results),
        claims=tables.claims(results),
    )


@cache
def _templates() -> Environment:
    """Compiled once per process."""
    templates = Environment(
        loader=PackageLoader("kvconform_reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(counted=outcomes.counted, duration=outcomes.duration)
    templates.tests["in_spec"] = BY_NAME.__contains__
    return templates


def headline(rows: Sequence[tables.Backend]) -> str:
    """The number of backends per standing, in one sentence."""
    if not rows:
        return "No results were given"
    if len(rows) == 1:
        return f"{rows[0].label} is {rows[0].standing.word}"
    words: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.standing.code):
        words[row.standing.word] = words.get(row.standing.word, 0) + 1
    if len(words) == 1:
        return f"All {len(rows)} backends are {next(iter(words))}"
    return f"Of {len(rows)} backends " + ", ".join(f"{n} {'is' if n == 1 else 'are'} {w}" for w, n in words.items())


def policy(style: str, script: str) -> str:
    """The content security policy: only this style and this script."""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _source(templates: Environment, name: str) -> Markup:
    """The unmodified style sheet or script, from our own package data."""
    assert templates.loader is not None
    return Markup(templates.loader.get_source(templates, name)[0].strip())


def _runs(results: Sequence[Results]) -> tuple[tuple[str, str], ...]:
    """What the runs share or differ in, for the line below the headline."""
    found = []
    for name, values in (
        ("suite", [result.suite for result in results]),
        ("effort", [result.effort for result in results]),
        ("seed", [str(result.seed) for result in results]),
        ("dtypes", [", ".join(result.dtypes) for result in results]),
        ("started", sorted(outcomes.when(result.started) for result in results)),
    ):
        distinct = list(dict.fromkeys(values))
        if name == "started" and len(distinct) > 2:
            distinct = [distinct[0], distinct[-1]]
        found.append((name, (" to " if name == "started" else " / ").join(distinct)))
    return tuple(found)


def _software(latency: Record | None) -> tables.Facts | None:
    """The versions in the speed record, side by side if recorded per backend."""
    if latency is None or not latency.software:
        return None
    by_backend = all(isinstance(versions, dict) for versions in latency.software.values())
    software = latency.software if by_backend else {"versions": latency.software}
    return tables.beside(list(software), list(software.values()))


def _latency_facts(latency: Record | None) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    if latency is None:
        return ()
    run = {
        "started": outcomes.when(latency.started),
        "device": latency.device,
        "suite": latency.suite,
        "load average": _load(latency.load),
        "took": outcomes.duration(latency.seconds),
        "raw rounds": len(latency.rounds),
    }
    parts = (("Run", run), ("Protocol", latency.protocol), ("Machine", latency.machine))
    return tuple((title, tuple(tables.flattened(part))) for title, part in parts if part)


def _load(values: Sequence[float]) -> str:
    """At the start, after each restart except the last, and at the end."""
    if not values:
        return "not recorded"
    first, *between, last = [f"{value:.2f}" for value in values] if len(values) > 1 else [f"{values[0]:.2f}", ""]
    after = f"{', '.join(between)} after restarts, " if between else ""
    return f"{first} at the start, {after}{last} at the end" if last else f"{first} at the start"
