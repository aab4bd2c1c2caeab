"""Runs the soak and writes its record: python -m soak -o docs/evidence/soak/record.json"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec

from kvconform.files import write_versioned
from soak import adapters, inputs, kills, steady
from soak.page import Record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--inputs", type=int, default=100_000, help="malformed inputs")
    parser.add_argument("--kills", type=int, default=200, help="kills of runs and workers")
    parser.add_argument("--programs", type=int, default=100_000, help="programs of the long run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvconform-") as scratch:
        record = Record(
            inputs=inputs.soak(given.inputs, _folder(scratch, "inputs")),
            adapters=adapters.soak(_folder(scratch, "adapters")),
            kills=kills.soak(given.kills, _folder(scratch, "kills")),
            steady=steady.soak(given.programs),
        )
    write_versioned(given.out, record)
    print(msgspec.json.encode(record.bad).decode())
    raise SystemExit(bool(record.bad))


def _folder(scratch: str, name: str) -> Path:
    place = Path(scratch) / name
    place.mkdir()
    return place


if __name__ == "__main__":
    main()
