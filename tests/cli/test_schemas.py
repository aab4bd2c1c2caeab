"""The JSON Schemas of all files: every field has a description, and every number has a unit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from kvconform.cli.schemas import FILES, file_name, json_schema

FOLDER = ROOT / "docs" / "schema"
UNITS = re.compile(
    r"\b(nanoseconds|seconds|bytes|MHz|processes|tokens|multiply-adds|logits|index|indices|position|numbers? of|"
    r"how many|how often|size of the outputs|fraction|no unit|in the unit of|seed)\b",
    re.IGNORECASE,
)
"""What the description of a number contains: a unit, what is counted, or that there is no unit."""


def properties(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, definition in json_schema(kind)["$defs"].items():
        for field, found in definition.get("properties", {}).items():
            yield f"{name}.{field}", found


def is_number(found: Any) -> bool:
    """Whether a property is a number, or an array, an object or a union of numbers."""
    match found:
        case {"type": "integer" | "number"}:
            return True
        case {"anyOf": options}:
            return any(map(is_number, options))
        case {"items": items}:
            return is_number(items)
        case {"prefixItems": items}:
            return any(map(is_number, items))
        case {"additionalProperties": values}:
            return is_number(values)
    return False


@pytest.mark.parametrize("kind", FILES)
def test_every_field_has_a_description_and_every_number_a_unit(kind: str) -> None:
    found = dict(properties(kind))
    assert len(found) > 5
    assert [place for place, one in found.items() if not one["description"]] == []
    numbers = {place: one["description"] for place, one in found.items() if is_number(one)}
    assert [place for place, text in numbers.items() if not UNITS.search(text)] == []


@pytest.mark.parametrize("kind", FILES)
def test_every_description_is_a_sentence_or_a_phrase_that_ends(kind: str) -> None:
    assert [place for place, one in properties(kind) if not re.search(r"[.)]$", one["description"])] == []


def test_the_documents_have_a_schema_of_each_kind() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {file_name(kind) for kind in FILES}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_schema_is_valid(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))
