"""All clauses about serving on one engine, with its results in the format that every other command reads."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from kvconform.errors import BackendUnavailable, Unavailable, UnknownClause, WorkerDied
from kvconform.host import machine
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.guarantees import measured
from kvconform.results.results import Results
from kvconform.results.serving import Served
from kvconform.search.effort import Effort
from kvconform.serving.first_token import first_tokens
from kvconform.serving.noise import Calibration, calibrate
from kvconform.serving.process import EngineDied, opened
from kvconform.serving.registry import is_url, referenced
from kvconform.serving.session import Limits, Session, Spent
from kvconform.serving.verdict import Trial
from kvconform_specs import SUITE_VERSION
from kvconform_specs.serving.clauses import CLAUSES, CONFIG, ServingClause

OFF = {
    "request": "answers without the prefix cache are had by a parameter of the request",
    "salt": "answers without the prefix cache are had by a salt that no request had before: that trusts the key of the "
    "cache, which is itself judged; a server without caching is a stronger reference",
    "second engine": "answers without the prefix cache come from a second engine that has none",
    "none": "there is no way of switching the prefix cache off: nothing can be compared",
}


def selected(prefixes: Sequence[str]) -> tuple[ServingClause, ...]:
    """The clauses whose names begin so; all without a prefix. Raises UnknownClause."""
    for prefix in prefixes:
        if not any(clause.name.startswith(prefix) for clause in CLAUSES):
            words = f"no clause about serving starts with {prefix!r}"
            raise UnknownClause("clause", prefix, (clause.name for clause in CLAUSES), words)
    return tuple(clause for clause in CLAUSES if not prefixes or clause.name.startswith(tuple(prefixes)))


def run_engine(
    name: str,
    address: str,
    effort: Effort,
    seed: int,
    out: Path,
    limits: Limits,
    clauses: Sequence[str] = (),
    tell: Callable[[Verdict], None] = lambda verdict: None,
    begin: Callable[[Results, Sequence[tuple[str, str]]], None] = lambda results, keys: None,
) -> Results:
    """Judges an engine and writes ``out/name.json`` after each clause. An engine that cannot be reached gives results
    that say why (``unavailable``). Raises InvalidBackend, UnknownClause."""
    chosen = selected(clauses)
    results = Results(
        suite=SUITE_VERSION,
        backend=name,
        device="cpu",
        dtypes=[],
        effort=effort.name,
        seed=seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        clauses=list(clauses),
        environment={"python": platform.python_version(), "hypothesis": version("hypothesis"), "machine": machine()},
    )
    path = out / f"{name}.json"
    began = time.perf_counter()
    bare, model = referenced(address)
    try:
        engine = opened(bare)
    except BackendUnavailable as error:
        return _unavailable(results, path, str(error), isinstance(error, Unavailable))
    except EngineDied as death:
        return _unavailable(results, path, f"the engine does not start: {death}", False)
    try:
        # a server that was there before may have seen the programs of this seed: each run draws other token ids
        nonce = secrets.randbits(31) if is_url(address) else seed
        by_model = any(clause.by_model for clause in chosen)
        with closing(Session(engine, limits, nonce, model, by_model=by_model)) as session:
            _judge(results, session, address, chosen, effort, seed, out / "failures" / name, path, tell, begin)
    except EngineDied as death:
        return _unavailable(results, path, f"the engine gives no answer: {death}", False)
    except BackendUnavailable as error:  # of the model
        return _unavailable(results, path, str(error), isinstance(error, Unavailable))
    finally:
        engine.close()
        results.seconds = round(time.perf_counter() - began, 3)
    results.finished = True
    results.write(path)
    return results


def _unavailable(results: Results, path: Path, why: str, lacking: bool) -> Results:
    results.unavailable, results.lacking, results.finished = why, lacking, True
    results.write(path)
    return results


def _judge(
    results: Results,
    session: Session,
    address: str,
    clauses: Sequence[ServingClause],
    effort: Effort,
    seed: int,
    folder: Path,
    path: Path,
    tell: Callable[[Verdict], None],
    begin: Callable[[Results, Sequence[tuple[str, str]]], None],
) -> None:
    """Measures the noise, then judges clause by clause."""
    began = time.perf_counter()
    gauge = _measured(session)
    results.served = served(session, gauge)
    results.dtypes = [session.facts.dtype or "unknown"]
    begin(results, [(clause.name, CONFIG) for clause in clauses])
    trial = Trial(session, gauge, address, folder, effort, seed, [])
    gone = ""
    for clause in clauses:
        try:
            verdict = trial.judge(clause) if not gone else _not_judged(clause, address, gone)
        except WorkerDied as death:
            verdict = _not_judged(clause, address, f"the model gives no answer: {death}")
        results.verdicts.append(verdict)
        results.served = served(session, gauge)
        results.seconds = round(time.perf_counter() - began, 3)
        results.write(path)
        tell(verdict)
        if not gone and (verdict.outcome.broken or verdict.outcome is Outcome.INCONCLUSIVE):
            gone = _gone(session)
    results.guarantees = measured(results.verdicts)
    results.finished = True
    if results.exit_code == 0 and not results.partial and session.facts.reports_hits:
        times = first_tokens(session, seed)
        results.served = msgspec.structs.replace(served(session, gauge), seconds_to_first=times)


def _measured(session: Session) -> Calibration:
    try:
        if session.facts.cache_off != "none":
            return calibrate(session)
    except Spent:
        pass
    return Calibration(
        lengths=(), noise=0.0, floor=0.0, repeat=0.0, effect=0.0, effect_on_decode=0.0, changes=0, seen=0
    )


def _gone(session: Session) -> str:
    """Why nothing more is asked; empty where the engine still answers."""
    try:
        session.answers()
    except EngineDied as death:
        return f"not judged: the engine gives no answer any more: {death}"
    except Spent:
        pass
    return ""


def _not_judged(clause: ServingClause, address: str, why: str) -> Verdict:
    return Verdict(
        clause=clause.name,
        config=CONFIG,
        backend=address,
        outcome=Outcome.INCONCLUSIVE,
        reason=Reason.NO_REFERENCE,
        sentence=why,
    )


def served(session: Session, gauge: Calibration) -> Served:
    """What is known of the engine so far."""
    facts = session.facts
    assumed = [*facts.assumed, OFF[facts.cache_off]]
    if facts.dtype is None:
        assumed.append("its dtype is not told: rounding is taken to be that of float32 at least")
    if facts.block is None:
        assumed.append(f"its block is not told: programs are drawn for blocks of {session.sizes.block} tokens")
    if not facts.reports_hits:
        assumed.append("it does not tell what came from the cache, so that no clause about hits is exercised")
    model = session.model
    measured = msgspec.structs.asdict(gauge)
    kept = {name: measured[name] for name in ("lengths", "noise", "floor", "repeat", "effect", "changes", "seen")}
    return Served(
        engine=facts.engine,
        version=facts.version,
        model=facts.model,
        dtype=facts.dtype,
        vocabulary=facts.vocabulary,
        context=facts.context,
        block=facts.block,
        cache_tokens=facts.cache_tokens,
        cache_off=facts.cache_off,
        reports_hits=facts.reports_hits,
        alternatives=facts.alternatives,
        abilities=sorted(facts.abilities),
        assumed=assumed,
        requests=session.sent,
        hits=session.hits,
        preemptions=session.preempted(),
        void=session.voids,
        bound=gauge.bound,
        reference="" if model is None else model.address,
        reference_bound=None if model is None else model.power.bound,
        reference_effect=None if model is None else model.power.effect,
        **kept,
    )
