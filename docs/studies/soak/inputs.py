"""Malformed inputs of every kind: each must be read, or refused with an error of ours; a traceback is a bug."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvconform.bench.counters import record as counters
from kvconform.cli import settings as repository
from kvconform.cli.main import app
from kvconform.errors import BackendUnavailable, KvconformError
from kvconform.results import gate, known_failures, results
from kvconform.results.merge import merged
from kvconform.run import check as checks
from kvconform.run.run import plan_for, run_backend
from kvconform.search import counterexample
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_reports import exports, html, junit, markdown, terminal
from kvconform_specs.clause import Case
from soak.mutations import JUNK, changed_json, changed_onnx, changed_toml

BROKEN = "kvconform_backends.faults.causality:TopLeft"
SETTINGS = """backends = ["TopLeft", "py:a.py:Net", "hf:x"]
effort = "pr"
dtypes = ["float32"]
device = "cpu"
seed = 0
python = "python"
step-timeout = 60
start-method = "fork"
results = "."
baseline = "kept"
known-failures = "known.toml"
"""
KNOWN = """schema = "kvconform-known-failures/1"

[[known]]
backend = "TopLeft"
clause = "equivalence.decode"
config = "attention-gqa"
reason = "bug in a library"
link = "https://github.com/owner/repository/issues/1"
versions = { numpy = "2.*" }
expires = 2027-03-31
counterexample = "COUNTEREXAMPLE"
"""
COMMANDS = ("run", "check", "replay", "diff", "gate", "verify", "merge", "report", "spec", "schema", "init")
LEAST = 12
"""How many inputs of a kind are tried at least."""
UNSAFE = {"--install-completion", "--show-completion", "--on", "--write", "--self-test", "--out", "-o"}
"""Options that change the shell, use a cluster, or write to a place that is drawn."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What came of the inputs of one kind."""

    name: str
    """What was malformed."""
    tried: int
    """How many inputs were tried."""
    refused: int
    """How many were refused with an error of ours."""
    tracebacks: int
    """How many ended in any other exception."""
    places: list[str] = []
    """The exceptions behind the tracebacks, each with the place in our code that raised it."""


@dataclass(frozen=True)
class Trial:
    """A strategy for inputs of one kind, what is done with one, its share of all inputs, and one that is right: what is
    tried differs from it by a little, and would reach nothing if it were refused itself."""

    inputs: st.SearchStrategy[Any]
    use: Callable[[Any], None]
    share: float
    right: Any


def soak(number: int, folder: Path, say: Callable[[str], None] = print) -> list[Kind]:
    """Tries about ``number`` inputs. ``folder``: a scratch folder, in which everything happens."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        found = []
        for name, trial in trials(folder).items():
            found.append(tried(name, trial, max(LEAST, round(number * trial.share))))
            one = found[-1]
            say("\n  ".join((f"{one.name}: {one.tried} tried, {one.tracebacks} tracebacks", *one.places)))
        return found
    finally:
        os.chdir(here)


def tried(name: str, trial: Trial, number: int) -> Kind:
    trial.use(trial.right)
    counts = {"tried": 0, "refused": 0, "tracebacks": 0}
    places: dict[str, None] = {}

    @settings(max_examples=number, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(trial.inputs)
    def one(drawn: Any) -> None:
        counts["tried"] += 1
        try:
            trial.use(drawn)
        except KvconformError:
            counts["refused"] += 1
        except Exception as error:  # noqa: BLE001
            counts["tracebacks"] += 1
            places.setdefault(_place(error))

    one()
    return Kind(name=name, places=[*places], **counts)


def _place(error: Exception) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "kvconform" in f.filename]
    last = ours[-1]
    words = str(error).splitlines()[0][:100] if str(error) else ""
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} ({last.name}): {words}"


def trials(folder: Path) -> dict[str, Trial]:
    """Each kind of input, made of files that a short run has written."""
    plan = plan_for("smoke", clauses=("shape.", "equivalence.decode"), configs=("attention-gqa",), explain=True)
    valid = run_backend("TopLeft", WorkerSpec(BROKEN), plan, folder)
    stored = next((folder / "failures").rglob("equivalence.decode*.json"))

    def written(use: Callable[[Path], object], name: str = "mutated") -> Callable[[bytes], None]:
        def write_and_use(data: bytes) -> None:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            use(path)

        return write_and_use

    def use_results(path: Path) -> None:
        found = results.read(path)
        for render in (terminal.table, junit.render, exports.badge):
            render([found])
        exports.benchmark([found], None)
        markdown.render([found], [], None, folder="results", audit=None)
        gate.compare(found, valid)
        gate.compare(valid, found)
        merged([found])

    def use_report(path: Path) -> None:
        html.render([results.read(path)], [], None, folder="results", audit=None, moved=None)

    def use_counterexample(path: Path) -> None:
        found = counterexample.read(path)
        Case.from_json(found.case, "case")

    def use_settings(path: Path) -> None:
        for one in repository.defaults(repository.read(path), folder).values():
            for value in one.values():
                value() if callable(value) else None

    def use_decoder(path: Path) -> None:
        with WorkerClient(WorkerSpec(f"onnx:{path}", step_timeout=60.0)) as client:
            for config in client.configs.values():
                client.build(config)

    decoder = _decoder(folder / "right.onnx")
    known = KNOWN.replace("COUNTEREXAMPLE", str(stored))
    text = (folder / "TopLeft.json").read_bytes()
    small = msgspec.structs.replace(
        valid, maps={}, diagnoses={}, verdicts=valid.failures[:1] + tuple(valid.verdicts[:2])
    )
    (folder / "small.json").write_bytes(msgspec.json.encode(small))
    return {
        "results, as every reader takes them": Trial(
            changed_json((folder / "small.json").read_bytes()),
            written(use_results),
            0.3,
            (folder / "small.json").read_bytes(),
        ),
        "results with maps and diagnoses, in the report": Trial(changed_json(text), written(use_report), 0.02, text),
        "counterexamples and their programs": Trial(
            changed_json(stored.read_bytes()), written(use_counterexample), 0.25, stored.read_bytes()
        ),
        "lists of known failures": Trial(
            changed_toml(known), written(known_failures.read, "known.toml"), 0.1, known.encode()
        ),
        "settings": Trial(
            changed_toml(SETTINGS), written(use_settings, f"apart/{repository.OWN_FILE}"), 0.1, SETTINGS.encode()
        ),
        "counters": Trial(changed_json(_counters()), written(counters.read), 0.08, _counters()),
        "ONNX decoders, opened and built": Trial(
            changed_onnx(decoder), written(use_decoder, "decoder.onnx"), 0.005, decoder
        ),
        "options of targets": Trial(_options(), _use_options, 0.1, ("numpy", "", [], [])),
        "command lines": Trial(_command_lines(folder), _use_command_line, 0.05, ["schema"]),
    }


def _decoder(path: Path) -> bytes:
    """The exported decoder of the examples."""
    script = Path(__file__).parents[3] / "examples/export_decoder.py"
    subprocess.run([sys.executable, str(script), str(path)], check=True, stdout=subprocess.DEVNULL)
    return path.read_bytes()


def _counters() -> bytes:
    """A few counts of the baseline of this project."""
    whole = json.loads((Path(__file__).parents[2] / "baseline" / "counters.json").read_bytes())
    return json.dumps({**whole, "counts": whole["counts"][:3]}).encode()


# --- options ---
def _options() -> st.SearchStrategy[Any]:
    words = st.sampled_from(
        ("init", "claim", "max_chunk", "kv_bits", "quantiser", "convention", "=", "{", "}", '"', "1", "null", "x", "")
    )
    text = st.lists(words, max_size=6).map("".join) | st.text(max_size=12) | st.sampled_from(JUNK).map(json.dumps)
    pair = st.tuples(st.sampled_from(("max_chunk", "kv_bits", "overflow", "quantiser", "x")), text).map("=".join)
    targets = st.sampled_from(("numpy", "a.py:X", "x.onnx", "hf:x", "")) | st.text(max_size=12)
    return st.tuples(targets, text, st.lists(pair | text, max_size=3), st.lists(pair | text, max_size=3))


def _use_options(drawn: Any) -> None:
    target, init, options, claims = drawn
    checks.addresses(target, checks.options(init, options, claims))


def _command_lines(folder: Path) -> st.SearchStrategy[Any]:
    import typer

    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {o for name in COMMANDS for one in commands[name].params for o in one.opts if o.startswith("-")} - UNSAFE
    files = [
        str(folder / "TopLeft.json"),
        str(folder / "small.json"),
        str(folder),
        "none.json",
        str(folder / "mutated"),
    ]
    values = (
        "numpy",
        "eager",
        "smoke",
        "float32",
        "1/2",
        "2/1",
        "0",
        "-1",
        "1e9",
        "",
        "x",
        "a.py:X",
        "shape",
        "\udcff",
    )
    word = st.sampled_from(sorted(options)) | st.sampled_from([*files, *values]) | st.text(max_size=6)
    return st.tuples(st.sampled_from(COMMANDS), st.lists(word, max_size=5)).map(lambda drawn: [drawn[0], *drawn[1]])


def _use_command_line(arguments: list[str]) -> None:
    """No worker starts: what is tested ends before."""
    absent = BackendUnavailable("no worker in this test")
    with patch.object(WorkerClient, "__init__", side_effect=absent):
        done = CliRunner().invoke(app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code == 2:
        raise KvconformError(done.output)
