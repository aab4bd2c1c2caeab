"""Files that are nearly right: valid ones with a few changes, drawn by Hypothesis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**70, 0.5, 1e308, -0.0, "", " ", "x", "\n", "\u0000", "é\u202e", "9" * 400),
    *([], {}, [[]], [None], {"x": {}}, [1, "x"], {"": 0}, "a.b", "decoder-x", "../x", "[red]", "-1/0", "float32"),
)
"""What is put in the place of a value."""
RAW = (b"", b"\x00", b"null", b"[]", b"{}", b"[" * 5000, b'{"schema": 1}', b"\xff\xfe", b"\x1f\x8b", b"NaN", b"1e999")
"""Files that were never right."""
Path = tuple[str | int, ...]


@st.composite
def changed_json(draw: Any, text: bytes) -> bytes:
    """A JSON file in which up to three values are replaced, removed, doubled, renamed or moved, or bytes are lost."""
    if draw(st.integers(0, 19)) == 0:
        return bytes(draw(st.sampled_from(RAW)))
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if places:
            _change(draw, document, draw(st.sampled_from(places)), places)
    return _cut(draw, json.dumps(document).encode())


def _places(value: Any, at: Path = ()) -> Iterator[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from _places(inner, (*at, key))


def _change(draw: Any, document: Any, place: Path, places: list[Path]) -> None:
    holder: Any = document
    for key in place[:-1]:
        holder = holder[key]
    key = place[-1]
    match draw(st.sampled_from(("replace", "replace", "remove", "double", "rename", "move"))):
        case "replace":
            holder[key] = json.loads(json.dumps(draw(st.sampled_from(JUNK))))
        case "remove":
            del holder[key]
        case "double" if isinstance(holder, list):
            holder.append(json.loads(json.dumps(holder[int(key)])))
        case "rename" if isinstance(holder, dict):
            holder[str(draw(st.sampled_from(("", "x", "schema", str(key).upper()))))] = holder.pop(key)
        case _:
            other = document
            for step in draw(st.sampled_from(places)):
                other = other[step]
            holder[key] = json.loads(json.dumps(other))


def _cut(draw: Any, data: bytes) -> bytes:
    """The file, in one of ten cases without its end or with one other byte."""
    if not data or draw(st.integers(0, 9)):
        return data
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] if draw(st.booleans()) else data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


@st.composite
def changed_onnx(draw: Any, model: bytes) -> bytes:
    """An ONNX file in which up to three fields of its graph are changed, or bytes are lost."""
    import onnx
    from google.protobuf import json_format  # type: ignore[import-untyped]

    text = json_format.MessageToJson(onnx.load_from_string(model)).encode()
    try:
        changed = json_format.Parse(draw(changed_json(text)), onnx.ModelProto()).SerializeToString()
    except (json_format.ParseError, UnicodeDecodeError):  # no field of ONNX has such a value
        at = draw(st.integers(0, min(len(model) - 1, draw(st.sampled_from((200, 10_000, len(model)))))))
        changed = model[:at] + bytes([draw(st.integers(0, 255))]) + model[at + 1 :]
    return _cut(draw, changed)


VALUES = ('""', '"x"', "1", "-1", "true", "[]", "[1]", "{}", "1.5", "nan", "1979-05-27", '["x", 1]', "{ x = 1 }", "")


@st.composite
def changed_toml(draw: Any, text: str) -> bytes:
    """A TOML file in which up to three lines are removed, doubled or have another value."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(("value", "value", "remove", "double", "key"))):
            case "value" if "=" in lines[at]:
                lines[at] = f"{lines[at].partition('=')[0]}= {draw(st.sampled_from(VALUES))}"
            case "remove" if len(lines) > 1:
                del lines[at]
            case "double":
                lines.insert(at, lines[at])
            case _:
                lines[at] = f"{draw(st.sampled_from(('x', '[x]', '[[known]]', 'known', 'backends')))} = 1"
    return _cut(draw, "\n".join(lines).encode())
