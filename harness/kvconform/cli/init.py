"""``kvconform init``: the settings of a repository, and a workflow that judges it on each change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvconform.api import file_name
from kvconform.cli import settings
from kvconform.cli.discover import Found, discover
from kvconform.cli.options import Json, print_json, say
from kvconform.files import write_atomically
from kvconform.search.effort import DEFAULT_EFFORT

WORKFLOW, BASELINE = Path(".github/workflows/kvconform.yml"), "kvconform-baseline"


def init(
    backend: Annotated[
        list[str], typer.Option("--backend", "-b", help="What to judge; default: what is found. May be repeated.")
    ] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Writes settings and a GitHub workflow for what the current folder holds.

    It looks for adapters, modules whose forward takes a cache, ONNX decoders and models of transformers. Settings are
    [tool.kvconform] in pyproject.toml if there is one, otherwise kvconform.toml. What exists is kept.
    """
    found = [Found(address) for address in backend] or discover(Path.cwd())
    own, shared = Path(settings.OWN_FILE), Path(settings.SHARED_FILE)
    written, kept = [], []
    place = shared if shared.is_file() and not own.is_file() else own
    if own.is_file() or (shared.is_file() and settings.table(shared) is not None):
        kept.append(str(place))
    else:
        text = settings_text(found, table=place == shared)
        before = place.read_text(encoding="utf-8").rstrip("\n") + "\n\n" if place.is_file() else ""
        write_atomically(place, (before + text).encode())
        settings.read(place)
        written.append(str(place))
    if WORKFLOW.is_file():
        kept.append(str(WORKFLOW))
    else:
        write_atomically(WORKFLOW, workflow_text(found, install=_installable()).encode())
        written.append(str(WORKFLOW))
    if as_json:
        addresses = [{"address": one.address, "lacking": one.lacking} for one in found]
        print_json({"found": addresses, "written": written, "kept": kept})
        return
    for line in lines(found, written, kept):
        say(line)


def lines(found: Sequence[Found], written: Sequence[str], kept: Sequence[str]) -> list[str]:
    """What was found and done, and what to type next."""
    told = [f"found: {one.address}{_needs(one)}" for one in found]
    if not found:
        told = ["found nothing to judge: name it in the settings (backends), or write an adapter"]
    told += [f"wrote: {path}" for path in written] + [f"kept: {path}, which exists" for path in kept]
    ready = _ready(found)
    first = (
        f"kvconform run -b '{ready[0].address}' --effort smoke" if len(ready) > 1 else "kvconform run --effort smoke"
    )
    if not ready:
        return told
    return [
        *told,
        "\nNext:",
        f"  {first}\n      whether it can be judged at all; kvconform check TARGET says more about a module",
        f"  kvconform run --out {BASELINE}\n      results to commit: the workflow shows what moved since",
    ]


def _ready(found: Sequence[Found]) -> list[Found]:
    """What has a whole address, each name of results once."""
    named: dict[str, Found] = {}
    for one in found:
        if not one.lacking:
            named.setdefault(file_name(one.address), one)
    return [*named.values()]


def _needs(one: Found) -> str:
    return f"; its constructor needs {', '.join(one.lacking)}" if one.lacking else ""


def _whole(one: Found) -> str:
    """The address with the arguments of the constructor, whose values are to be corrected."""
    options = json.dumps({"init": dict.fromkeys(one.lacking, 1)}, separators=(",", ":"))
    return f"{one.address}?{options}" if one.lacking else one.address


def settings_text(found: Sequence[Found], table: bool) -> str:
    """The settings as TOML; what cannot be judged as it stands is a comment with the reason."""
    ready = _ready(found)
    rows = [f"    {json.dumps(one.address)}," for one in ready]
    for one in found:
        if one not in ready:
            why = "correct the arguments" if one.lacking else "its results would have the name of another's"
            rows.append(f"    # {json.dumps(_whole(one))},  {why}")
    listed = "\n".join(rows) or '    # such as "my_cache.py:MyCache", or "py:model.py:Attention" for a module as it is'
    return "\n".join(
        (
            f"[{settings.TABLE}]" if table else "# The defaults of kvconform's options; the command line wins.",
            f"backends = [\n{listed}\n]",
            f'effort = "{DEFAULT_EFFORT}"  # smoke is quicker, nightly tries more',
            'dtypes = ["float32"]',
            'results = "results"',
            f'baseline = "{BASELINE}"',
            '# known-failures = "known.toml"',
            "",
        )
    )


def _installable() -> str:
    """How the repository itself is installed; empty if it is no project."""
    if any(Path(name).is_file() for name in ("setup.py", "setup.cfg")):
        return "pip install ."
    shared = Path(settings.SHARED_FILE)
    if shared.is_file() and "[project]" in shared.read_text(encoding="utf-8"):
        return "pip install ."
    return "pip install -r requirements.txt" if Path("requirements.txt").is_file() else ""


def workflow_text(found: Sequence[Found], install: str) -> str:
    """The workflow, which uses this project's action; what is judged stands in the settings."""
    extras = sorted({one.extra for one in found if one.extra})
    steps = ["- uses: actions/checkout@v4", '- uses: actions/setup-python@v5\n        with: { python-version: "3.12" }']
    if extras:
        steps.append("- run: pip install torch --index-url https://download.pytorch.org/whl/cpu")
    if install:
        steps.append(f"- run: {install}")
    given = [f'extras: "{",".join(extras)}"'] if extras else []
    given += [f"baseline: \"${{{{ hashFiles('{BASELINE}/*.json') != '' && '{BASELINE}' || '' }}}}\"", 'comment: "true"']
    steps.append("- uses: kvconform/kvconform@main\n        with:\n" + "\n".join(f"          {one}" for one in given))
    steps.append(
        "- if: always()\n        uses: actions/upload-artifact@v4\n"
        "        with: { name: kvconform, path: kvconform-results }"
    )
    body = "\n".join(f"      {step}" for step in steps)
    return f"""name: kvconform
on: [push, pull_request]
permissions: {{ contents: read, pull-requests: write }} # for the comment with what moved
jobs:
  conformance:
    runs-on: ubuntu-latest
    steps:
{body}
"""
