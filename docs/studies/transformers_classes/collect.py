"""Checks every causal language model class: ``python -m transformers_classes.collect -o FILE.json [NAME...]``.

One ``kvconform check`` a class with its dynamic cache, and ``plain``. The file is written after each class; classes
that it holds already are left out, so that an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from kvconform.files import write_atomically
from kvconform.results.results import read
from transformers_classes.page import NOT_CHECKED

LIMIT = 600.0
"""Seconds after which a check is ended."""
OUTCOMES = {0: "conformant", 1: "broken", 5: "inconclusive"}
"""By exit code of ``kvconform check``; any other is a refusal."""


def classes() -> list[str]:
    """The config classes of which ``AutoModelForCausalLM`` makes a model."""
    from transformers.models.auto import auto_mappings, modeling_auto

    configs: Mapping[str, str] = auto_mappings.CONFIG_MAPPING_NAMES
    return sorted({configs[kind] for kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in configs})


def checked(name: str) -> dict[str, Any]:
    """What the check says of a class."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvconform", "check", f"hf:{name}", "--option", 'cache="dynamic"', "--out"]
        try:
            done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            return {"outcome": "too slow", "seconds": LIMIT}
        found = {"outcome": OUTCOMES.get(done.returncode, "refused"), "seconds": round(time.monotonic() - started, 1)}
        files = sorted(Path(folder).glob("*.json"))
        results = read(files[0]) if files else None
    if results is None or found["outcome"] == "refused":
        said = done.stderr.strip() or done.stdout.strip()
        return {**found, "why": said.rsplit("\n", 1)[-1] if said else f"exit code {done.returncode}"}
    found |= {"programs": sum(verdict.programs for verdict in results.verdicts)}
    if results.target is not None:
        found["recognised"] = results.target.recognised
    if results.failures:
        found |= {
            "clauses": sorted({verdict.clause for verdict in results.failures}),
            "why": results.failures[0].sentence,
        }
    elif found["outcome"] != "conformant":
        found["why"] = results.summary
    return {**found, "plain": plain(name)}


def plain(name: str) -> dict[str, float | str]:
    """What transformers alone does with the class."""
    command = [sys.executable, "-m", "transformers_classes.plain", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        return {"all": done.stderr.strip().rsplit("\n", 1)[-1][:160]}
    cases: dict[str, float | str] = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])[name]
    return cases


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    held: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found: dict[str, Any] = held.get("classes", {})
    names = [
        name
        for name in options.names or classes()
        if found.get(name, {"outcome": NOT_CHECKED})["outcome"] == NOT_CHECKED
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(checked, name): name for name in names}
        for done in as_completed(running):
            name, one = running[done], done.result()
            found[name] = one
            print(f"{name}: {one['outcome']}, {one['seconds']} s", flush=True)
            body = {"transformers": transformers.__version__, "classes": dict(sorted(found.items()))}
            write_atomically(options.out, json.dumps(body, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
