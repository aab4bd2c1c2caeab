"""``conformance(backend)``: the suite as one importable call, for tests of other projects."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvconform.errors import BackendUnavailable, Unavailable
from kvconform.results.known_failures import EMPTY
from kvconform.results.known_failures import read as read_known_failures
from kvconform.results.results import Results
from kvconform.run.check import undecided
from kvconform.run.run import plan_for, run_backend
from kvconform.search.effort import DEFAULT_EFFORT
from kvconform.worker.client import STEP_TIMEOUT, WorkerSpec
from kvconform.worker.registry import address_of
from kvconform.worker.start import FORK


def conformance(
    backend: str | type,
    *,
    effort: str = DEFAULT_EFFORT,
    seed: int = 0,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    clauses: Sequence[str] = (),
    configs: Sequence[str] = (),
    python: str = sys.executable,
    step_timeout: float = STEP_TIMEOUT,
    start_method: str = FORK,
    known_failures: Path | str | None = None,
    out: Path | str | None = None,
) -> Results:
    """Judges a backend, and returns its results if nothing speaks against conformance (``Results.ok``).

    backend: the class, or an address: an installed name, ``module:Name`` or ``file.py:Name``.
    effort: how much is tried for each cell: ``smoke``, ``pr`` or ``nightly``.
    clauses, configs: prefixes of names; only matching cells are judged.
    python: the interpreter of the worker process.
    step_timeout: seconds without progress after which a worker is killed.
    start_method: how workers are started: ``fork``, where that is possible, or ``spawn``; verdicts are the same.
    known_failures: a TOML file of known failures.
    out: the folder for results and counterexamples; default: a temporary one.

    Raises AssertionError with one line for each failure if the backend is not conformant, or if a selected core clause
    was not passed; ValueError (``BadArgument``, ``SpecError``, ``InvalidBackend``) for a bad argument, a malformed file
    or a class that is not a backend; ``Unavailable`` if this machine lacks something (a test may turn it into a skip);
    ``BackendUnavailable`` if the backend does not exist or fails to load.
    """
    known = EMPTY if known_failures is None else read_known_failures(Path(known_failures))
    address = backend if isinstance(backend, str) else address_of(backend)
    plan = plan_for(effort, seed, dtypes, clauses, configs)
    spec = WorkerSpec(address, device, python, step_timeout, start_method=start_method)
    with tempfile.TemporaryDirectory(prefix="kvconform-") as scratch:
        folder = Path(scratch if out is None else out)
        results = run_backend(file_name(address), spec, plan, folder, known_failures=known)
    if results.ok:
        return results
    if results.exit_code == 3:
        raise (Unavailable if results.lacking else BackendUnavailable)(results.unavailable)
    lines = [f"{v.clause} on {address} [{v.config}]: {v.sentence}" for v in results.failures]
    raise AssertionError("\n".join([f"{address}: {results.summary}", *lines, *results.stale, *undecided(results)]))


def file_name(address: str) -> str:
    """A short name for a backend's results: the last word of its address; ``LlamaConfig-static`` for a target that is
    called in several ways."""
    target, _, text = address.partition("?")
    kind, colon, rest = target.partition(":")
    if colon and kind in ("onnx", "hf"):
        rest = Path(rest).stem if rest.endswith(".onnx") else Path(rest).name
        return "-".join([rest, *([options["cache"]] if "cache" in (options := json.loads(text or "{}")) else [])])
    return target.rpartition(":")[2] if colon else target
