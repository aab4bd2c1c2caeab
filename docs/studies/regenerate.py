"""The generated files of the project, and the program that renews them: ``nox -s regenerate``.

``python -m regenerate [PATH ...]`` renews the files that are out of date, or those of them whose path begins with an
argument. ``--list`` prints what each file is made from; ``--force`` also makes files that are up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import api_page
import engine_results.page
import fleet_page
import msgspec
import serving_page
import soak.page
import speed_page
import timing.collect
import timing.page
import transformers_classes.page

from kvconform.bench import record as speed
from kvconform.bench.gate.self_test import history
from kvconform.cli.schemas import FILES as KINDS
from kvconform.cli.schemas import file_name, json_schema
from kvconform.files import read_versioned, write_atomically
from kvconform.judging.every_clause import BY_NAME as EVERY
from kvconform.judging.every_clause import CHAPTERS
from kvconform.mutation import power
from kvconform.results import results
from kvconform.spec_docs import page
from kvconform_reports.terminal import table
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import DTYPES
from kvconform_specs.errors import SpecError

ROOT = Path(__file__).parents[2]
COMMAND = "nox -s regenerate"
BASELINES = ("eager", "compiled", "onnx")
STAMP = ROOT / ".regenerated.json"
"""Digests of the sources of slow files, by path; git ignores it."""
MEASURED = {
    "docs/baseline/counters.json": "nox -s counters, then copy results/counters.json",
    "docs/evidence": "kvconform bench --preset, see CONTRIBUTING.md",
    "docs/evidence/engines": "nox -s 'conformance(NAME)' and engine_results.collect, see docs/studies/README.md",
    "docs/evidence/transformers": "python -m transformers_classes.collect, see docs/studies/README.md",
    "docs/evidence/serving": "nox -s 'engine(NAME)' and vllm_faults, see docs/studies/README.md",
    "docs/evidence/fleet": "python -m fleet_page collect, see docs/fleet.md",
    "docs/evidence/soak": "nox -s soak",
    "docs/latency-samples.json.gz": "nox -s timing, on an idle machine",
    "docs/published-designs.md": "nox -s designs",
    "docs/vectors-power.json": "kvconform vectors write DIR and vectors power DIR -o docs/vectors-power.json",
}
"""Files that take a measurement, and how each is made; nothing here renews them."""


@dataclass(frozen=True)
class Generated:
    """One file, or the files below one folder."""

    path: str
    source: str
    """What it is made from, in words."""
    make: Callable[[], Mapping[str, bytes]]
    """The contents that the files should have, by path. Raises SpecError if they cannot be made here."""
    minutes: int = 0
    """About how long ``make`` takes on two cores; 0 for seconds."""
    current: Callable[[], bool] = lambda: False
    """Whether it is certain without ``make`` that the files are up to date."""


# --- what each is made from ---
def _spec() -> dict[str, bytes]:
    return {"docs/spec.md": page.page().encode()}


def _api() -> dict[str, bytes]:
    return {"docs/api.md": api_page.render().encode()}


def _schemas() -> dict[str, bytes]:
    texts = {file_name(kind): json.dumps(json_schema(kind), indent=1) + "\n" for kind in KINDS}
    return {f"docs/schema/{name}": text.encode() for name, text in texts.items()}


def _speed() -> dict[str, bytes]:
    records = sorted((ROOT / "docs/evidence").glob("*.json*"))
    return {"docs/speed.md": speed_page.render({path.name: speed.read(path) for path in records}).encode()}


def _transformers() -> dict[str, bytes]:
    source = transformers_classes.page.RESULTS
    results = ROOT / "docs" / source
    study, issues = (
        json.loads(file.read_text()) for file in (results, results.with_name(transformers_classes.page.ISSUES))
    )
    return {"docs/transformers.md": transformers_classes.page.render(study, source, issues).encode()}


def _fleet() -> dict[str, bytes]:
    return {"docs/fleet.md": fleet_page.render(json.loads((ROOT / "docs" / fleet_page.COSTS).read_text())).encode()}


def _engines() -> dict[str, bytes]:
    return {
        "docs/engines.md": engine_results.page.render(
            engine_results.page.study(), engine_results.page.findings()
        ).encode()
    }


def _serving() -> dict[str, bytes]:
    return {"docs/engines-serving.md": serving_page.page().encode()}


def _reliability() -> dict[str, bytes]:
    source = "evidence/soak/record.json"
    record = read_versioned(ROOT / "docs" / source, soak.page.Record, soak.page.SCHEMA, "record of a soak")
    return {"docs/reliability.md": soak.page.render(record, source).encode()}


def _latency() -> dict[str, bytes]:
    samples = timing.collect.read(ROOT / "docs" / timing.page.SAMPLES)
    rendered = timing.page.render(samples, history(ROOT / "docs" / timing.page.HISTORY))
    return {f"docs/{name or 'latency.md'}": text.encode() for name, text in rendered.items()}


def _readme() -> dict[str, bytes]:
    """The counts of clauses, and the table that the main job prints for the results in docs/baseline."""
    text = (ROOT / "README.md").read_text()
    judged = table([results.read(_baseline(name)) for name in sorted(BASELINES)])
    for pattern, words in (
        (r"\d+ clauses in \d+ chapters", f"{len(EVERY)} clauses in {len(CHAPTERS)} chapters"),
        (r"^backend +pass .*?(?=^report: )", f"{judged}\n"),
    ):
        text, count = re.subn(pattern, lambda _, words=words: words, text, flags=re.MULTILINE | re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise SpecError("README.md", f"want {pattern!r} once, found it {count} times")
    return {"README.md": text.encode()}


def _power() -> dict[str, bytes]:
    entries = []
    for dtype in DTYPES:
        print(f"  {dtype}", flush=True)
        entries.append(power.power_table(dtype))
    return {"harness/kvconform/mutation/power_table.json": power.shipped_as(entries)}


def _power_is_current() -> bool:
    stored = msgspec.json.decode((ROOT / "harness/kvconform/mutation/power_table.json").read_bytes())
    stamps = msgspec.json.decode(STAMP.read_bytes()) if STAMP.exists() else {}
    return stored["suite"] == SUITE_VERSION and stamps.get("power") == _digest()


def _digest() -> str:
    """Of what the power table follows from, and of the table itself."""
    folders = ("specs", "harness/kvconform/judging", "harness/kvconform/mutation")
    files = [
        file for folder in folders for file in sorted((ROOT / folder).rglob("*")) if file.suffix in (".py", ".json")
    ]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _baseline(name: str) -> Path:
    return ROOT / "docs/baseline" / f"{name}.json"


def _run(name: str) -> dict[str, bytes]:
    """The results of a run with the default effort. A run that was interrupted is resumed."""
    out = ROOT / "results" / "baseline"
    command = ["kvconform", "run", "-b", name, "--out", str(out), "--jobs", "2"]  # as the main job does
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode != 0:
        raise SpecError(name, f"kvconform run ended with exit code {done.returncode}; the old baseline stays")
    return {f"docs/baseline/{name}.json": (out / f"{name}.json").read_bytes()}


def _baseline_is_current(name: str) -> bool:
    """Whether a baseline is of this suite and has every clause. ``nox -s gate`` compares the rest."""
    try:
        stored = results.read(_baseline(name))
    except (SpecError, OSError):
        return False  # of another schema
    return stored.suite == SUITE_VERSION and {verdict.clause for verdict in stored.verdicts} == set(BY_NAME)


FILES = (
    Generated("docs/spec.md", "specs/kvconform_specs", _spec),
    Generated("docs/api.md", "the docstrings of what kvconform exports", _api),
    Generated("docs/schema", "the structs of results, records and lists", _schemas),
    Generated("docs/speed.md", "docs/evidence", _speed),
    Generated("docs/transformers.md", "docs/evidence/transformers", _transformers),
    Generated("docs/engines.md", "docs/evidence/engines", _engines),
    Generated("docs/engines-serving.md", "docs/evidence/serving", _serving),
    Generated("docs/fleet.md", "docs/evidence/fleet", _fleet),
    Generated("docs/reliability.md", "docs/evidence/soak/record.json", _reliability),
    Generated("docs/latency.md", "docs/latency-samples.json.gz and docs/gate-history.jsonl", _latency),
    Generated(
        "harness/kvconform/mutation/power_table.json", "every clause and null model", _power, 2, _power_is_current
    ),
    *(
        Generated(
            f"docs/baseline/{name}.json",
            f"kvconform run -b {name}",
            lambda name=name: _run(name),  # type: ignore[misc]
            4,
            lambda name=name: _baseline_is_current(name),  # type: ignore[misc]
        )
        for name in BASELINES
    ),
    Generated("README.md", "the clauses and docs/baseline", _readme),
)
"""In the order in which they are renewed: a file stands behind those that it is made from."""


def stale(file: Generated) -> Iterator[str]:
    """The paths whose contents are not those that ``make`` gives, and those that it does not give at all."""
    wanted = file.make()
    for path, content in wanted.items():
        if not (ROOT / path).is_file() or (ROOT / path).read_bytes() != content:
            yield path
    folder = ROOT / file.path
    if folder.is_dir():
        yield from sorted({str(path.relative_to(ROOT)) for path in folder.iterdir()} - wanted.keys())


def renew(file: Generated, force: bool = False) -> str:
    """Writes what is out of date, and says in a few words what was done."""
    if file.current() and not force:
        return "up to date"
    if file.minutes:
        print(f"{file.path}: this takes about {file.minutes} minutes", flush=True)
    began = time.perf_counter()
    wanted = file.make()
    changed = list(stale(Generated(file.path, file.source, lambda: wanted)))
    for path in changed:
        if path in wanted:
            write_atomically(ROOT / path, wanted[path])
        else:
            (ROOT / path).unlink()
    if file.make is _power:
        write_atomically(STAMP, msgspec.json.encode({"power": _digest()}))
    took = f" in {time.perf_counter() - began:.0f} s"
    return f"renewed{took}: {', '.join(changed)}" if changed else f"up to date{took if file.minutes else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m regenerate", description=__doc__)
    parser.add_argument("paths", nargs="*", help="only files whose path begins so")
    parser.add_argument("--list", action="store_true", help="print what each file is made from, and end")
    parser.add_argument("--force", action="store_true", help="also make files that are up to date")
    given = parser.parse_args()
    chosen = [file for file in FILES if file.path.startswith(tuple(given.paths) or "")]
    if not chosen:
        parser.error(f"no generated file begins with {' or '.join(given.paths)}")
    if given.list:
        for file in chosen:
            print(f"{file.path}: from {file.source}")
        for path, how in MEASURED.items():
            print(f"{path}: measured, not renewed here: {how}")
        return
    failed = False
    for file in chosen:
        try:
            print(f"{file.path}: {renew(file, given.force)}", flush=True)
        except SpecError as error:
            failed = True
            print(f"{file.path}: not renewed: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
