"""Files for other tools have the format that those tools document."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import report_data as given
import speed_data
from msgspec.structs import replace
from typer.testing import CliRunner

from kvconform.cli.main import app
from kvconform.results.results import Results
from kvconform_reports import exports, junit

BENCHMARK = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "unit", "value"],
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "unit": {"type": "string"},
            "value": {"type": "number"},
            "range": {"type": "string"},
            "extra": {"type": "string"},
        },
        "additionalProperties": False,
    },
}
"""https://github.com/benchmark-action/github-action-benchmark: what it reads for ``customSmallerIsBetter``."""
BADGE = {
    "type": "object",
    "required": ["schemaVersion", "label", "message"],
    "properties": {
        "schemaVersion": {"const": 1},
        "label": {"type": "string"},
        "message": {"type": "string", "minLength": 1},
        "color": {"enum": ["brightgreen", "red", "lightgrey", "yellow"]},
        "isError": {"type": "boolean"},
    },
    "additionalProperties": False,
}
"""https://shields.io/badges/endpoint-badge, and which of its colours are used."""

ATTRIBUTES = {  # by element: required attributes, optional ones
    "testsuites": (set(), {"name", "tests", "failures", "errors", "skipped", "time"}),
    "testsuite": ({"name", "tests", "failures", "errors"}, {"skipped", "time", "timestamp", "hostname"}),
    "properties": (set(), set()),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name", "classname"}, {"time"}),
    "failure": (set(), {"type", "message"}),
    "error": (set(), {"type", "message"}),
    "skipped": (set(), {"type", "message"}),
}
CHILDREN = {
    "testsuites": re.compile(r"(testsuite )*"),
    "testsuite": re.compile(r"(properties )?(testcase )*"),
    "properties": re.compile(r"(property )+"),
    "testcase": re.compile(r"(properties )?((failure|error|skipped) )?"),
}
"""The elements and attributes of JUnit XML as Jenkins, GitLab and pytest write and read it."""


def valid_junit(text: str) -> None:
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        required, optional = ATTRIBUTES[element.tag]
        assert required <= set(element.keys()) <= required | optional, element.tag
        children = "".join(f"{child.tag} " for child in element)
        pattern = CHILDREN.get(element.tag)
        assert pattern.fullmatch(children) if pattern else not children, (element.tag, children)
        if "time" in element.keys():  # noqa: SIM118
            assert re.fullmatch(r"\d+(\.\d+)?", element.get("time", ""))
        if "timestamp" in element.keys():  # noqa: SIM118
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.get("timestamp", ""))
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))


def conformant() -> Results:
    return given.results("numpy", given.everywhere())


def test_junit_has_the_elements_and_attributes_that_its_readers_know() -> None:
    valid_junit(junit.render([*given.four(), given.black_box("mine"), conformant()]))
    valid_junit(junit.render([]))


def test_the_benchmark_file_has_counts_and_times_with_intervals_each_under_one_name() -> None:
    judged, speed = [*given.four(), conformant()], speed_data.latency()
    found = json.loads(exports.benchmark(judged, speed))
    jsonschema.validate(found, BENCHMARK)
    names = [one["name"] for one in found]
    assert len(set(names)) == len(names)
    values = {one["name"]: one["value"] for one in found}
    broken = [sum(verdict.outcome.broken for verdict in one.verdicts) for one in judged]
    assert [value for name, value in values.items() if name.endswith(": broken cells")] == broken
    timed = [one for one in found if one["unit"] == "ns/step"]
    assert timed
    for one in timed:
        low, high = map(float, re.findall(r"\d+(?= to)|(?<=to )\d+", one["range"]))
        assert low <= one["value"] <= high
    assert json.loads(exports.benchmark([], None)) == []


@pytest.mark.parametrize(
    ("judged", "message", "colour"),
    [
        ([conformant()], "conformant", "brightgreen"),
        ([given.results("x", given.broken(given.everywhere()))], "non-conformant", "red"),
        ([conformant(), given.results("x", given.broken(given.everywhere()))], "1 of 2 conformant", "red"),
        ([replace(conformant(), shard="1/2")], "part of a run", "lightgrey"),
        ([replace(conformant(), finished=False)], "undecided", "yellow"),
        ([replace(conformant(), verdicts=[], unavailable="no torch")], "unavailable", "lightgrey"),
        ([conformant(), replace(conformant(), shard="1/2")], "1 of 2 conformant", "lightgrey"),
        ([], "0 of 0 conformant", "lightgrey"),
    ],
)
def test_a_badge_is_green_only_for_conformance(judged: list[Results], message: str, colour: str) -> None:
    found: dict[str, Any] = json.loads(exports.badge(judged))
    jsonschema.validate(found, BADGE)
    assert (found["message"], found["color"], found["isError"]) == (message, colour, colour == "red")


def test_a_report_writes_them_on_request(tmp_path: Path) -> None:
    conformant().write(tmp_path / "numpy.json")
    out = {name: str(tmp_path / name) for name in ("report.html", "junit", "benchmark", "badge")}
    options = [word for name in ("junit", "benchmark", "badge") for word in (f"--{name}", out[name])]
    done = CliRunner().invoke(app, ["report", str(tmp_path / "numpy.json"), "-o", out["report.html"], *options])
    assert done.exit_code == 0, done.output
    valid_junit(Path(out["junit"]).read_text())
    jsonschema.validate(json.loads(Path(out["benchmark"]).read_text()), BENCHMARK)
    jsonschema.validate(json.loads(Path(out["badge"]).read_text()), BADGE)
