"""The command line: the list of commands, and how errors become exit codes. Decisions are made in other packages."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvconform import __version__
from kvconform.cli import audit, baseline, bench, demo, diff, init, report, run, settings, spec, vectors, verify
from kvconform.cli.options import errors, say
from kvconform.errors import BackendUnavailable, KvconformError
from kvconform.results.results import EXIT_CODES
from kvconform_specs import SUITE_VERSION

# Hypothesis stores tables in a folder; by default in the current one
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "kvconform-hypothesis"))


class Commands(TyperGroup):
    """An error of ours becomes one sentence and an exit code, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KvconformError as error:
            say(f"kvconform: {error}", errors)
            raise typer.Exit(
                3 if isinstance(error, BackendUnavailable) else 2 if isinstance(error, ValueError) else 1
            ) from error


app = typer.Typer(
    name="kvconform",
    cls=Commands,
    help="Tests implementations of KV-cache attention against their definition without a cache.\n\n\b\nExit codes:\n"
    + "\n".join(f"  {code}  {words}" for code, words in EXIT_CODES.items()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point."""
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"kvconform {__version__}, suite {SUITE_VERSION}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    file = settings.find(Path.cwd())
    if file is not None:
        context.default_map = settings.defaults(settings.read(file), file.parent)


app.command()(demo.demo)
app.command()(init.init)
app.command()(run.run)
app.command()(run.check)
app.command()(run.replay)
app.command()(diff.diff)
app.command()(baseline.gate)
app.command()(verify.verify)
app.command()(baseline.merge)
app.command()(audit.audit)
app.add_typer(bench.app, name="bench")
app.add_typer(vectors.app, name="vectors")
app.command()(report.report)
app.command()(spec.backends)
app.command()(spec.spec)
app.command()(audit.power)
app.command()(spec.schema)
