"""The hooks of MkDocs for the site of the documentation: the pages outside ``docs``, the page of the command line,
links that lead out of ``docs``, and a folder for each version of the suite.

The theme's version selector reads ``versions.json``, which lists the folders that are there: a build keeps those of
earlier suites. The first page leads to the newest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

import typer

from kvconform import __version__
from kvconform.cli.main import app
from kvconform_specs import SUITE_VERSION

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/kvconform/kvconform"
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "design.md": "DESIGN.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are made of a file outside ``docs``, by their place on the site."""
CLI = "cli.md"
FIRST_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvconform</title>
<meta http-equiv="refresh" content="0; url={newest}/"></head>
<body><a href="{newest}/">kvconform, suite {newest}</a></body></html>
"""
LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)#\s]+)((?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    config.copyright = f"kvconform {__version__}, suite {SUITE_VERSION}"
    config.site_dir = str(Path(config.site_dir) / SUITE_VERSION)
    config.site_url = f"{config.site_url}{SUITE_VERSION}/"
    return config


def on_post_build(config: Any) -> None:
    list_versions(Path(config.site_dir).parent)


def list_versions(site: Path) -> None:
    """Writes ``versions.json``, the newest suite first, and the first page, which leads to it."""
    folders = (path.name for path in site.iterdir() if re.fullmatch(r"\d+(\.\d+)+", path.name))
    names = sorted(folders, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    versions = [{"version": name, "title": f"suite {name}", "aliases": []} for name in names]
    (site / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    (site / "index.html").write_text(FIRST_PAGE.format(newest=names[0]))


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that do not lie in ``docs``."""
    kind = type(next(iter(files)))
    contents = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in OUTSIDE.items()}
    for page, text in {**contents, CLI: command_line()}.items():
        files.append(kind.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    return with_links(markdown, page.file.src_uri, {file.src_uri for file in files if not file.inclusion.is_excluded()})


def with_links(markdown: str, page: str, pages: Collection[str]) -> str:
    """A page whose links lead to pages of the site where there is one, otherwise to the repository."""
    places = {source: place for place, source in OUTSIDE.items()} | {f"docs/{place}": place for place in pages}
    source = OUTSIDE.get(page, f"docs/{page}")

    def led(found: re.Match[str]) -> str:
        target = normpath(f"{dirname(source)}/{found[2]}".lstrip("/"))
        if target in places:
            return f"{found[1]}{relpath(places[target], dirname(page) or '.')}{found[3]}"
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{found[1]}{REPOSITORY}/{kind}/main/{target}{found[3]}"

    return LINK.sub(led, markdown)


def command_line() -> str:
    """The help of every command."""
    lines = ["# Command line", "", "What `kvconform COMMAND --help` prints."]
    for name, text in helps(typer.main.get_command(app), "kvconform"):
        lines += ["", f"## `{name}`", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def helps(command: Any, name: str, parent: Any = None) -> list[tuple[str, str]]:
    """The help of a command and of those below it, each with its name."""
    context = command.context_class(command, info_name=name.rpartition(" ")[2], parent=parent, terminal_width=100)
    found = [(name, command.get_help(context).rstrip())]
    for word, below in getattr(command, "commands", {}).items():
        found += helps(below, f"{name} {word}", context)
    return found
