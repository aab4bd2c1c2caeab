"""``kvconform report``: results as HTML, JUnit XML and Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvconform.bench import record as speeds
from kvconform.bench.record import Record
from kvconform.cli.diff import compared
from kvconform.cli.options import Json, Junit, print_json, say
from kvconform.files import family_of, write_atomically
from kvconform.mutation import record as audits
from kvconform.results import results
from kvconform.results.results import Results
from kvconform.run import cross_backend
from kvconform.run.cross_backend import Pair
from kvconform.run.run import named_configs


def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Results files, a speed record, the record of an audit.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("reports/out/report.html"),
    junit: Junit = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a Markdown summary.")] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="Also write JSON for github-action-benchmark (customSmallerIsBetter).")
    ] = None,
    badge: Annotated[Path | None, typer.Option(help="Also write JSON for an endpoint badge of shields.io.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier run, a file or a folder: the report begins with what moved since.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes the HTML report, and prints a short table."""
    from kvconform_reports import exports, html, terminal
    from kvconform_reports import junit as junit_reports
    from kvconform_reports import markdown as markdown_reports
    from kvconform_reports.view.moved import since

    judged, speed, pairs, audited = _collect(files)
    folder = str(files[0].parent)
    moved = None if against is None else since(str(against), *compared(against, files)[:3])
    page = html.render(judged, pairs, speed, folder=folder, audit=audited, moved=moved)
    write_atomically(out, page.encode())
    if junit is not None:
        write_atomically(junit, junit_reports.render(judged).encode())
    if markdown is not None:
        text = markdown_reports.render(judged, pairs, speed, folder=folder, audit=audited)
        write_atomically(markdown, text.encode())
    if benchmark is not None:
        write_atomically(benchmark, exports.benchmark(judged, speed).encode())
    if badge is not None:
        write_atomically(badge, exports.badge(judged).encode())
    if as_json:
        rows = {
            one.backend: {"exit_code": one.exit_code, "summary": one.summary, "counts": one.counts} for one in judged
        }
        print_json({"report": str(out.resolve()), "backends": rows})
        return
    for text in filter(None, (terminal.table(judged), terminal.legend(judged))):
        say(text)
    say(f"report: {out.resolve()}")


def _collect(files: list[Path]) -> tuple[list[Results], Record | None, list[Pair], audits.AuditRecord | None]:
    """Results, the speed record, the comparison of backends that ran side by side, and the audit of the clauses."""
    judged: list[Results] = []
    speed: Record | None = None
    audited: audits.AuditRecord | None = None
    for file in files:
        if speeds.is_record(file):
            speed = speeds.read(file)
        elif family_of(file) == audits.SCHEMA.partition("/")[0]:
            audited = audits.read(file)
        else:
            judged.append(results.read(file))
    names = [one.backend for one in judged]
    folders = sorted({file.parent / "vectors" for file in files})
    pairs = [pair for folder in folders for pair in cross_backend.pairs(folder, names, named_configs(judged))]
    return judged, speed, pairs, audited
