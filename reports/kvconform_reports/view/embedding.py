"""The data of a report inside the report: JSON in a script element that no browser runs, and the way back out."""

from __future__ import annotations

import base64
import bz2
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from markupsafe import Markup

from kvconform.bench.record import Record
from kvconform.judging.verdict import Verdict
from kvconform.mutation import record as audit_record
from kvconform.results.results import Results
from kvconform.run.cross_backend import Pair

SCHEMA = "kvconform-report/3"
# Beyond this the readable form gives way to a packed one: 20 000 verdicts are 5 MB of plain JSON, and in bz2 and base64
# 0.36 MB field by field, 0.41 MB verdict by verdict (in gzip 0.65 MB).
PLAIN_LIMIT = 400_000
_ELEMENT = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def embed(
    results: Sequence[Results],
    pairs: Sequence[Pair],
    latency: Record | None,
    audit: audit_record.AuditRecord | None = None,
) -> tuple[Markup, bool]:
    """The text of the script element, and whether it is packed.

    The raw rounds and tokens of the speed record stay in its own file: they are most of its bytes, and no figure here
    needs them."""
    speed: dict[str, Any] | None = None
    if latency is not None:
        speed = msgspec.to_builtins(latency)
        for raw in ("rounds", "tokens"):
            speed[raw], speed[f"{raw}_left_out"] = [], len(speed[raw])
    data = {"schema": SCHEMA, "results": list(results), "pairs": list(pairs), "latency": speed, "audit": audit}
    plain = msgspec.json.encode(data)
    packed = len(plain) > PLAIN_LIMIT
    if packed:
        plain = msgspec.json.encode({**data, "results": [_by_field(result) for result in results]})
        text = base64.b64encode(bz2.compress(plain)).decode()
        plain = msgspec.json.encode({"schema": SCHEMA, "bz2": text})
    return _inert(plain.decode()), packed


def _by_field(result: Results) -> dict[str, Any]:
    """The results with one list for each field of their verdicts: like stands beside like, which packs better."""
    found: dict[str, Any] = msgspec.to_builtins(result)
    rows = [msgspec.to_builtins(msgspec.structs.asdict(verdict)) for verdict in result.verdicts]
    found["verdicts"] = {name: [row[name] for row in rows] for name in Verdict.__struct_fields__}
    return found


def extract(html: str) -> dict[str, Any]:
    """The data of a rendered report: ``schema``, ``results``, ``pairs``, ``latency``, ``audit``. Raises ValueError
    where there is none."""
    found = _ELEMENT.search(html)
    if found is None:
        raise ValueError("this file holds no kvconform report data")
    data: dict[str, Any] = msgspec.json.decode(found[1])
    if "bz2" in data:
        data = msgspec.json.decode(bz2.decompress(base64.b64decode(data["bz2"])))
    for result in data["results"]:
        if isinstance(result["verdicts"], dict):
            names, columns = result["verdicts"].keys(), result["verdicts"].values()
            result["verdicts"] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return data


def _inert(json: str) -> Markup:
    """JSON in which no ``</script>``, comment or entity can begin; it means the same."""
    for character in "<>&\u2028\u2029":
        json = json.replace(character, f"\\u{ord(character):04x}")
    return Markup(json)  # nothing is left in it that HTML reads as anything but text
