"""Writes the JSON Schemas in ``docs/schema``: ``python -m schemas docs/schema``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvconform.cli.schemas import FILES, file_name, json_schema
from kvconform.files import write_atomically


def render() -> dict[str, str]:
    """The schemas, by file name."""
    return {file_name(kind): json.dumps(json_schema(kind), indent=1) + "\n" for kind in FILES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m schemas", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder; schemas of other versions in it are removed")
    folder = parser.parse_args().folder
    rendered = render()
    for old in set(folder.glob("*.json")) - {folder / name for name in rendered}:
        old.unlink()
    for name, text in rendered.items():
        write_atomically(folder / name, text.encode())


if __name__ == "__main__":
    main()
