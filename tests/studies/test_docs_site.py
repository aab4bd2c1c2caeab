"""The site of the documentation: its pages exist, its links lead somewhere, and its tables are whole. MkDocs itself
checks the rest in ``nox -s docs``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docs_site
import yaml
from places import ROOT

from kvconform.cli.main import app
from kvconform.cli.settings import KEYS

PAGES = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}


def pages(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_each_page_of_the_navigation_exists_and_each_guide_is_in_it() -> None:
    shown = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(set(shown)) == len(shown)
    assert set(shown) <= PAGES | {*docs_site.OUTSIDE, docs_site.CLI}
    assert {page for page in PAGES if page.startswith("guides/")} <= set(shown)


def test_links_lead_to_the_page_where_there_is_one_and_to_the_repository_otherwise() -> None:
    text = "[a](docs/spec.md#claims) [b](examples) [c](LICENSE) [d](#here) [e](https://x.org) ![f](docs/report.png)"
    linked = docs_site.with_links(text, "index.md", {"spec.md", "report.png"})
    there = docs_site.REPOSITORY
    assert linked == (
        f"[a](spec.md#claims) [b]({there}/tree/main/examples) [c]({there}/blob/main/LICENSE) [d](#here) "
        "[e](https://x.org) ![f](report.png)"
    )
    below = "[a](../../CONTRIBUTING.md#add-a-backend) [b](../black-boxes.md) [c](ci.md)"
    linked = docs_site.with_links(below, "guides/module.md", {"black-boxes.md", "guides/ci.md"})
    assert linked == "[a](../contributing.md#add-a-backend) [b](../black-boxes.md) [c](ci.md)"


def test_links_of_every_page_lead_to_a_file() -> None:
    for page in PAGES | set(docs_site.OUTSIDE):
        text = (ROOT / docs_site.OUTSIDE.get(page, f"docs/{page}")).read_text()
        for target in re.findall(rf"\]\({docs_site.REPOSITORY}/(?:blob|tree)/main/([^)#]+)", text):
            assert (ROOT / target).exists(), (page, target)
        linked = docs_site.with_links(text, page, PAGES)
        for kind, target in re.findall(rf"\]\({docs_site.REPOSITORY}/(blob|tree)/main/([^)#]+)", linked):
            place = ROOT / target
            assert place.is_dir() if kind == "tree" else place.is_file(), (page, target)


def test_every_command_is_on_the_page_of_the_command_line() -> None:
    page = docs_site.command_line()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"## `kvconform {command.name or command.callback.__name__}`" in page
    assert "## `kvconform bench gate`" in page
    assert "--known-failures" in page


def test_the_guide_lists_every_key_of_the_settings() -> None:
    guide = (ROOT / "docs" / "guides" / "ci.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", guide, re.MULTILINE) == [*KEYS]


def test_the_site_has_a_folder_for_each_suite_and_leads_to_the_newest(tmp_path: Path) -> None:
    for name in ("0.5.0", "0.10.0", "assets"):
        (tmp_path / name).mkdir()
    docs_site.list_versions(tmp_path)
    assert [one["version"] for one in json.loads((tmp_path / "versions.json").read_text())] == ["0.10.0", "0.5.0"]
    assert 'url=0.10.0/"' in (tmp_path / "index.html").read_text()
