"""``conformance(backend)``: the suite as one importable call, for people's own tests."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from kvconform.judging.verdict import Outcome
from kvconform.results.known_failures import EMPTY
from kvconform.results.known_failures import read as read_known_failures
from kvconform.results.results import Results, exit_code
from kvconform.run.run import Plan, cells, run_backend
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerSpec
from kvconform.worker.registry import address_of


def conformance(
    backend: str | type,
    *,
    effort: str = "smoke",
    seed: int = 0,
    device: str = "cpu",
    dtypes: tuple[str, ...] = ("float32",),
    clauses: tuple[str, ...] = (),
    configs: tuple[str, ...] = (),
    python: str = sys.executable,
    out: Path | str | None = None,
    known_failures: Path | str | None = None,
) -> Results:
    """Judges a backend: an address (installed name, ``module:Name``, ``file.py:Name``) or the class itself.

    Returns the results where the backend is conformant. Raises AssertionError with one line for each broken clause,
    or with the reason why there is no verdict. ``clauses`` and ``configs`` select by the beginning of their names;
    then something selected must pass, and nothing may be broken, inconclusive or not exercised. Raises ValueError
    where they select nothing. ``known_failures``: a file of known failures; SpecError, a ValueError, where it is malformed.
    """
    known = EMPTY if known_failures is None else read_known_failures(Path(known_failures))
    address = backend if isinstance(backend, str) else address_of(backend)
    with tempfile.TemporaryDirectory(prefix="kvconform-") as scratch:
        folder = Path(out) if out is not None else Path(scratch)
        plan = Plan(EFFORTS[effort], seed, dtypes, clauses, configs)
        if not any(cells(plan)):
            raise ValueError(f"no cell matches clauses {clauses or '*'} and configs {configs or '*'}")
        name = file_name(address)
        results = run_backend(name, WorkerSpec(address, device, python), plan, folder, known_failures=known)
        code, sentence = exit_code(results)
        outcomes = {verdict.outcome for verdict in results.verdicts}
        harmless = {Outcome.PASS, Outcome.KNOWN_FAILURE, Outcome.REFUTED, Outcome.UNSUPPORTED}
        part = Outcome.PASS in outcomes and outcomes <= harmless and not results.stale
        if code == 0 or (part and (clauses or configs)):
            return results
        lines = [f"{v.clause} on {address} [{v.config}]: {v.sentence}" for v in results.verdicts if v.outcome.broken]
        raise AssertionError("\n".join([f"{address}: {sentence}", *lines, *results.stale]))


def file_name(address: str) -> str:
    """A short name for a backend's results: the last word of its address, ``LlamaConfig-static`` for a target that is
    called in several ways."""
    target, _, text = address.partition("?")
    kind, colon, rest = target.partition(":")
    if colon and kind in ("onnx", "hf"):
        rest = Path(rest).stem if kind == "onnx" else Path(rest).name
        return "-".join([rest, *([options["cache"]] if "cache" in (options := json.loads(text or "{}")) else [])])
    return target.rpartition(":")[2] if colon else target
