"""Checks every causal language model class: ``python -m transformers_classes.collect -o FILE.json [NAME...]``.

One ``kvconform check`` a class with its dynamic cache, and ``plain``. The file is written after each class; classes
that it holds already are left out, so that an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from kvconform.files import write_atomically
from kvconform.results.results import read
from transformers_classes.page import NOT_CHECKED

LIMIT = 3600.0
"""Seconds after which a check is ended; nothing is recorded then, since the machine may have been busy."""
OUTCOMES = {0: "conformant", 1: "broken", 5: "inconclusive"}
"""By exit code of ``kvconform check``; any other is a refusal."""


def classes() -> list[str]:
    """The config classes of which ``AutoModelForCausalLM`` makes a model."""
    from transformers.models.auto import auto_mappings, modeling_auto

    configs: Mapping[str, str] = auto_mappings.CONFIG_MAPPING_NAMES
    return sorted({configs[kind] for kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in configs})


def checked(name: str) -> dict[str, Any] | None:
    """What the check says of a class; None if it did not end in time. ``cpu_seconds`` is the processor time of all its
    processes, which other load on the machine hardly changes; ``cut`` counts the cells that the time limit ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvconform", "check", f"hf:{name}", "--option", 'cache="dynamic"', "--out"]
        done = _run([*command, folder])
        if done is None:
            return None
        code, said, cpu_seconds = done
        found: dict[str, Any] = {
            "outcome": OUTCOMES.get(code, "refused"),
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(cpu_seconds, 1),
        }
        files = sorted(Path(folder).glob("*.json"))
        results = read(files[0]) if files else None
    if results is None or found["outcome"] == "refused":
        return {**found, "why": said.rsplit("\n", 1)[-1] if said else f"exit code {code}"}
    found |= {
        "programs": sum(verdict.programs for verdict in results.verdicts),
        "cut": sum(verdict.cut for verdict in results.verdicts),
    }
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


def _renewed(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**found[name], "plain": plain(name)} if "plain" in found[name] else found[name]


def _run(command: list[str]) -> tuple[int, str, float] | None:
    """The exit code of a command, what it said last, and the processor time of its processes; None after ``LIMIT``."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        until = time.monotonic() + LIMIT
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > until:
                os.killpg(process.pid, signal.SIGKILL)
                os.wait4(process.pid, 0)
                return None
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        said = ""
        for stream in (err, out):
            stream.seek(0)
            said = said or stream.read().decode(errors="replace").strip()
    return process.returncode, said, usage.ru_utime + usage.ru_stime


def plain(name: str) -> dict[str, float | str]:
    """What transformers alone does with the class."""
    command = [sys.executable, "-m", "transformers_classes.plain", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"all": done.stderr.strip().rsplit("\n", 1)[-1][:160]}
    cases: dict[str, float | str] = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])[name]
    return cases


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="measure again what transformers alone does, and no more")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    held: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found: dict[str, Any] = held.get("classes", {})
    measure = partial(_renewed, found) if options.plain else checked
    names = [
        name
        for name in options.names or classes()
        if (name in found if options.plain else found.get(name, {"outcome": NOT_CHECKED})["outcome"] == NOT_CHECKED)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(measure, name): name for name in names}
        for done in as_completed(running):
            name, one = running[done], done.result()
            if one is None:
                print(f"{name}: not ended after {LIMIT:.0f} s", flush=True)
                continue
            found[name] = one
            print(f"{name}: {one['outcome']}, {one['seconds']} s", flush=True)
            body = {"transformers": transformers.__version__, "classes": dict(sorted(found.items()))}
            write_atomically(options.out, json.dumps(body, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
