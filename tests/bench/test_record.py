"""The file of a speed record: columns, compression, and what a reader says of a malformed one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from speed_data import latency

from kvconform.bench.record import Record, Round, Tokens, is_record, read, write
from kvconform.cli.schemas import json_schema
from kvconform_specs.errors import SpecError


def document(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["speed.json", "speed.json.gz"])
def test_a_record_survives_its_file(name: str, tmp_path: Path) -> None:
    record = latency()
    assert record.rounds
    assert record.tokens
    write(record, tmp_path / name)
    assert read(tmp_path / name) == record
    assert is_record(tmp_path / name)


def test_a_record_without_rounds_survives_its_file(tmp_path: Path) -> None:
    record = latency()
    record.rounds, record.tokens = [], []
    write(record, tmp_path / "speed.json")
    assert read(tmp_path / "speed.json") == record


def test_rounds_are_columns_and_each_column_and_each_entry_is_one_line(tmp_path: Path) -> None:
    record, path = latency(), tmp_path / "speed.json"
    write(record, path)
    written = document(path)
    assert written["rounds"]["ns"] == [one.ns for one in record.rounds]
    assert written["tokens"]["ns"] == [one.ns for one in record.tokens]
    lines = path.read_text().splitlines()
    assert sum(line.startswith('  "ns": [') for line in lines) == 2
    fields = len(msgspec.structs.fields(Record))
    entries = sum(len(value) for value in written.values() if isinstance(value, dict | list))
    assert len(lines) <= 2 + 2 * fields + entries


def test_a_column_that_holds_nothing_but_the_default_is_left_out(tmp_path: Path) -> None:
    record, path = latency(), tmp_path / "speed.json"
    record.rounds = [msgspec.structs.replace(one, sm_mhz=0, throttle=0) for one in record.rounds]
    write(record, path)
    assert not {"sm_mhz", "throttle"} & document(path)["rounds"].keys()
    record.rounds[-1] = msgspec.structs.replace(record.rounds[-1], sm_mhz=1500)
    write(record, path)
    assert document(path)["rounds"]["sm_mhz"][-2:] == [0, 1500]
    assert read(path) == record


def test_a_compressed_record_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz", "c.json"):
        write(latency(), tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == (tmp_path / "c.json").read_bytes()


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([[0, 0, 0, 0, 0, 1, 1, 0]], "Expected `object`, got `array`"),
        ({"case": [0]}, "Round has no column 'restart'"),
        (
            {name: [1] for name in Round.__struct_fields__} | {"ns": [1, 2]},
            "column 'case' of Round has 1 values, not 2",
        ),
        ({name: [1] for name in Round.__struct_fields__} | {"ns": ["x"]}, "Expected `int`, got `str`"),
    ],
)
def test_malformed_columns_are_one_sentence(rounds: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    write(latency(), path)
    path.write_text(json.dumps(document(path) | {"rounds": rounds}))
    with pytest.raises(SpecError, match="holds no speed record") as raised:
        read(path)
    assert words in str(raised.value)


@pytest.mark.parametrize("data", [b"{}", gzip.compress(b"{}" * 100, mtime=0)[:-9], b"\x1f\x8b" + bytes(40)])
def test_what_is_no_compressed_file_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "speed.json.gz"
    path.write_bytes(data)
    with pytest.raises(SpecError, match=r"speed\.json\.gz: "):
        read(path)
    assert not is_record(path)


def test_a_record_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text('{"schema": "kv-latency/9"}')
    assert is_record(path)
    with pytest.raises(SpecError, match="unknown schema 'kv-latency/9'; known: kv-latency/2"):
        read(path)
    path.write_text('{"schema": "kvconform-results/1"}')
    assert not is_record(path)


def test_the_schema_describes_the_file_rather_than_the_struct(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema, path = json_schema("speed"), tmp_path / "speed.json"
    write(latency(), path)
    jsonschema.validate(document(path), schema)
    for kind, required in ((Round, 8), (Tokens, 5)):
        columns = schema["$defs"][kind.__name__]
        assert list(columns["properties"]) == list(kind.__struct_fields__)
        assert columns["required"] == list(kind.__struct_fields__)[:required]
    for name in ("rounds", "tokens"):
        rows = document(path) | {name: msgspec.to_builtins(getattr(latency(), name))}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(rows, schema)
