"""``kvconform diff``: what moved between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer

from kvconform.bench import record as speeds
from kvconform.bench.analysis.moved import MovedTime, moved_times, not_comparable
from kvconform.cli.options import Json, print_json, say
from kvconform.errors import BadArgument
from kvconform.files import family_of, write_atomically
from kvconform.results import results
from kvconform.results.diff import Difference, words
from kvconform.results.diff import diff as differences_of


class Moved(NamedTuple):
    """The differences of all backends, the times that both runs have, why times are not compared, and the files that
    only one side has."""

    differences: list[Difference]
    times: list[MovedTime]
    no_times: str
    alone: list[str]


def diff(
    before: Annotated[Path, typer.Argument(help="A results file, a speed record, or a folder of them.")],
    after: Annotated[Path, typer.Argument(help="What to compare with it, of the same kind.")],
    markdown: Annotated[
        Path | None, typer.Option(help="Also write Markdown for a comment on a pull request; one screen.")
    ] = None,
    annotations: Annotated[bool, typer.Option(help="Print GitHub annotations instead of text.")] = False,
    as_json: Json = False,
) -> None:
    """Shows what moved between two runs: new failures, fixed cells, lost coverage, claims, errors and times.

    Cells that had other programs (another Hypothesis, suite, effort or seed) are counted, and never called a
    regression. The exit code is 0 whatever moved: kvconform gate decides.
    """
    from kvconform_reports import moved as texts
    from kvconform_reports.view.moved import headline

    found = compared(before, [after])
    if markdown is not None:
        write_atomically(markdown, texts.comment(found.differences, found.times, found.no_times).encode())
    if as_json:
        told = [{**msgspec.to_builtins(one), "words": words(one)} for one in found.differences]
        print_json({"differences": told, "times": found.times, "no_times": found.no_times, "alone": found.alone})
    elif annotations:
        for line in texts.workflow_commands(found.differences):
            say(line)
    else:
        say(headline(found.differences))
        for line in (*texts.lines(found.differences, found.times, found.no_times), *found.alone):
            say(line)


def compared(before: Path, after: Sequence[Path]) -> Moved:
    """What moved between the files of two runs.

    ``before`` is a file or a folder, ``after`` files or a folder. Files of the same name are compared; two single files
    whatever their names. Raises BadArgument if nothing can be compared.
    """
    alone: list[str] = []
    differences: list[Difference] = []
    times: list[MovedTime] = []
    no_times = ""
    for was, now in _pairs(before, after, alone):
        if speeds.is_record(was) and speeds.is_record(now):
            earlier, later = speeds.read(was), speeds.read(now)
            no_times = not_comparable(earlier, later)
            times += [] if no_times else moved_times(earlier, later)
        else:
            differences += differences_of(results.read(was), results.read(now))
    return Moved(differences, times, no_times, alone)


def _pairs(before: Path, after: Sequence[Path], alone: list[str]) -> list[tuple[Path, Path]]:
    """Files of the same name; ``alone`` receives a line for each file that only one side has."""
    if before.is_file() and len(after) == 1 and after[0].is_file():
        return [(before, after[0])]
    was, now = _files([before]), _files(after)
    pairs = [(path, now[name]) for name, path in was.items() if name in now]
    if not pairs:
        places = ", ".join(map(str, after))
        raise BadArgument("before", str(before), (), f"no file of {before} has the name of a file of {places}")
    alone += [f"only before: {name}" for name in was if name not in now]
    alone += [f"only now: {name}" for name in now if name not in was]
    return pairs


FAMILIES = {schema.partition("/")[0] for schema in (results.SCHEMA, speeds.SCHEMA)}


def _files(paths: Sequence[Path]) -> dict[str, Path]:
    """Results and speed records by name: the files among ``paths``, and those in the folders among them."""
    found = {}
    for path in paths:
        if not path.exists():
            raise BadArgument("results", str(path), (), f"{path}: there is no such file or folder")
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        found.update({file.name: file for file in files if family_of(file) in FAMILIES})
    return found
