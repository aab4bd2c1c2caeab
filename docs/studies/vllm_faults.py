"""Seven mistakes planted in vLLM itself: which clause sees each, and after how many requests.

``python docs/studies/vllm_faults.py -o FILE`` needs an environment with vLLM (``nox -s vllm_faults``).
The engine runs in this process on a tiny model. Rounding is measured on the clean engine, which is judged first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvconform.judging.verdict import Outcome
from kvconform.search.effort import effort_named
from kvconform.serving.engine import Engine
from kvconform.serving.noise import Calibration, calibrate
from kvconform.serving.run import selected
from kvconform.serving.session import Limits, Session
from kvconform.serving.verdict import Trial
from kvconform_backends.servers.opening import open_vllm

CLAUSES = ("divergence", "partition", "prefix-hit", "block-boundary", "second-turn", "neighbours", "eviction")
"""In the order in which they are tried: the first one that fails ends the trial of a fault."""
Hash = Callable[..., bytes]
"""As vLLM's ``hash_block_tokens(function, parent, tokens, extra)``."""


@dataclass(frozen=True)
class Fault:
    """``changed`` makes the wrong function from the right one; ``place``: its module or class, and its name."""

    name: str
    what: str
    changed: Callable[[Any], Any]
    place: tuple[str, str] = ("vllm.v1.core.kv_cache_utils", "hash_block_tokens")


def keyed(change: Callable[[Any, tuple[int, ...], Any], tuple[Any, Any, Any]]) -> Callable[[Hash], Hash]:
    """A key computed from changed parts: parent, tokens, extra keys."""
    return lambda right: (
        lambda function, parent, tokens, extra=None: right(function, *change(parent, tuple(tokens), extra))
    )


def short(right: Hash) -> Hash:
    """Keys of 8 bits."""
    return lambda *args: hashlib.sha256(right(*args)).digest()[:1] + bytes(31)


def not_counted(right: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """A hit takes a block from the free ones and does not count its reader, where there is one already."""

    def touch(pool: Any, blocks: Any) -> None:
        right(pool, blocks)
        for block in blocks:
            block.ref_cnt = min(block.ref_cnt, 1)

    return touch


FAULTS = (
    Fault("parent", "the key ignores the parent block", keyed(lambda p, t, e: (None, t, e))),
    Fault("last", "the key ignores the last token of a block", keyed(lambda p, t, e: (p, t[:-1], e))),
    Fault("first", "the key ignores the first token of a block", keyed(lambda p, t, e: (p, t[1:], e))),
    Fault("order", "the key ignores the order of tokens", keyed(lambda p, t, e: (p, tuple(sorted(t)), e))),
    Fault("8-bit", "the key has 8 bits", short),
    Fault("salt", "the key ignores the salt", keyed(lambda p, t, e: (p, t, None))),
    Fault(
        "count",
        "a second reader of a block is not counted",
        not_counted,
        ("vllm.v1.core.block_pool.BlockPool", "touch"),
    ),
)
"""The last one comes last: the engine may not survive it."""


@contextmanager
def planted(fault: Fault | None) -> Iterator[None]:
    if fault is None:
        yield
        return
    import pkgutil

    owner, name = pkgutil.resolve_name(fault.place[0]), fault.place[1]
    right = getattr(owner, name)
    setattr(owner, name, fault.changed(right))
    try:
        yield
    finally:
        setattr(owner, name, right)


def tried(engine: Engine, gauge: Calibration, fault: Fault | None, nonce: int, seconds: float) -> dict[str, Any]:
    """What each clause says, up to the first one that fails."""
    engine.reset()
    session = Session(engine, Limits(requests=100_000, seconds=3600.0), nonce)
    began, effort = time.perf_counter(), effort_named("smoke")
    trial = Trial(session, gauge, "vllm", Path(tempfile.mkdtemp()), effort, nonce, [])
    clauses = {clause.name: clause for clause in selected([f"serving.{name}" for name in CLAUSES])}
    found: dict[str, Any] = {
        "fault": None if fault is None else fault.name,
        "what": "nothing is planted" if fault is None else fault.what,
        "detected": "",
        "outcomes": {},
    }
    with planted(fault):
        for name in CLAUSES:
            before = session.sent
            verdict = trial.judge(clauses[f"serving.{name}"])
            found["outcomes"][verdict.clause] = verdict.outcome.value
            if verdict.outcome in (Outcome.FAIL, Outcome.CRASH):
                found |= {"detected": verdict.clause, "programs": verdict.found_after, "sentence": verdict.sentence}
                found |= {"steps": verdict.steps, "requests_of_clause": session.sent - before}
                break
            if time.perf_counter() - began > seconds:
                break
    return {**found, "requests": session.sent, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="vllm_faults.py", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, help="where to write what was found, as JSON")
    parser.add_argument("--only", nargs="*", default=[], help="names of faults")
    parser.add_argument("--seconds", type=float, default=300.0, help="for each fault")
    given = parser.parse_args()
    engine = open_vllm("", {})
    gauge = calibrate(Session(engine, Limits(requests=10_000, seconds=3600.0), 0))
    rows = []
    chosen = [fault for fault in FAULTS if not given.only or fault.name in given.only]
    for nonce, fault in enumerate([None, *chosen] if not given.only else chosen, 1):
        rows.append(tried(engine, gauge, fault, nonce, given.seconds))
        print(json.dumps(rows[-1]), flush=True)
        if given.out:
            measured = {"noise": gauge.noise, "effect": gauge.effect, "bound": gauge.bound}
            kept = {"engine": "vLLM", "version": engine.describe().version, **measured, "faults": rows}
            given.out.write_text(json.dumps(kept, indent=1) + "\n")
    engine.close()


if __name__ == "__main__":
    main()
