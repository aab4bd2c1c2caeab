"""Judges the answers that any program wrote to a set of vectors, by the relations of the clauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace as with_fields
from numpy.typing import NDArray

from kvconform.errors import Raised
from kvconform.host import machine
from kvconform.judging.judge import judge
from kvconform.judging.mismatch import Mismatch
from kvconform.judging.observed import Checked
from kvconform.judging.render import render
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.guarantees import measured
from kvconform.results.results import Results
from kvconform.search.counterexample import Counterexample, steps
from kvconform.search.digest import digest
from kvconform.vectors import record
from kvconform.vectors.choose import WIDE
from kvconform.vectors.features import without
from kvconform.vectors.record import Answers, Failure, Manifest, Vector
from kvconform.worker.execute import StepResult, Trace
from kvconform.worker.protocol import Traces
from kvconform_specs import SUITE_VERSION
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Level, Relation
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, Reject, UncachedForward, called
from kvconform_specs.reference.oracle import Expected, Generation, expect

Array = NDArray[Any]
EFFORT = "vectors"


def judged(folder: Path, answers: Path, failures: Path, tell: Callable[[Verdict], None] = lambda _: None) -> Results:
    """The results of a runner. Counterexamples are written to ``failures/<runner>``.

    Raises SpecError where the answers are not those of this set, or a file cannot be read.
    """
    began = time.perf_counter()
    manifest, told = record.read(folder), record.read_answers(answers)
    _check(manifest, told, answers)
    by_cell: dict[tuple[str, str], list[Vector]] = {}
    for vector in manifest.vectors:
        by_cell.setdefault((vector.clause, vector.config), []).append(vector)
    claims = claims_of(told)
    verdicts = []
    for vectors in by_cell.values():
        verdicts.append(_verdict(folder, manifest, vectors, told, answers, claims, failures / told.runner))
        tell(verdicts[-1])
    return Results(
        suite=manifest.suite,
        backend=told.runner,
        device="cpu",
        dtypes=list(manifest.dtypes),
        effort=EFFORT,
        seed=manifest.seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        environment={"vectors": manifest.digest, **manifest.versions, "machine": machine()},
        claims=claims.to_json(),
        verdicts=verdicts,
        clauses=list(manifest.asked["clauses"]),
        configs=list(manifest.asked["configs"]),
        guarantees=measured(verdicts),
        seconds=round(time.perf_counter() - began, 3),
        finished=True,
    )


def claims_of(told: Answers) -> Claims:
    """What a runner is judged under."""
    claims = without(WIDE, set(told.unsupported))
    kept = tuple(profile for profile in claims.profiles if profile not in told.unsupported)
    return replace(claims, profiles=kept)


def _check(manifest: Manifest, told: Answers, answers: Path) -> None:
    """Raises SpecError where the answers cannot be those to this set."""
    at = str(answers / record.ANSWERS)
    if manifest.suite != SUITE_VERSION:
        raise SpecError(
            "vectors", f"the set is of suite {manifest.suite}, this is suite {SUITE_VERSION}: write it again"
        )
    if told.digest != manifest.digest:
        raise SpecError(f"{at}.digest", f"answers another set: got {told.digest!r}, want {manifest.digest!r}")
    if not told.runner or "/" in told.runner or told.runner.startswith("."):
        raise SpecError(f"{at}.runner", f"want a name that can be a file's, got {told.runner!r}")
    for name in told.unsupported:
        if name not in manifest.skippable:
            known = ", ".join(sorted(manifest.skippable))
            raise SpecError(f"{at}.unsupported", f"unknown feature, config or profile {name!r}; known: {known}")
    names = {vector.name for vector in manifest.vectors}
    for name in told.failures:
        if name not in names:
            raise SpecError(f"{at}.failures", f"the set has no vector {name!r}")
    for path in sorted(answers.rglob("*.safetensors")):
        if path.relative_to(answers).with_suffix("").as_posix() not in names:
            raise SpecError(str(path), "is an answer to no vector of the set")


# --- cells ---
def _verdict(
    folder: Path,
    manifest: Manifest,
    vectors: Sequence[Vector],
    told: Answers,
    answers: Path,
    claims: Claims,
    failures: Path,
) -> Verdict:
    """The verdict on one cell: its vectors are judged up to the first that breaks the clause."""
    began, clause, config = time.perf_counter(), BY_NAME[vectors[0].clause], vectors[0].config
    cases = {vector.name: record.case_of(manifest, vector) for vector in vectors}
    skipped = {vector.name: words for vector in vectors if (words := skips(manifest, vector, told)) is not None}
    body = Verdict(
        clause=clause.name,
        config=config,
        backend=told.runner,
        outcome=Outcome.UNSUPPORTED,
        reason=Reason.ABILITY,
        sentence="; ".join(dict.fromkeys(words for _reason, words in skipped.values())) or "no vector",
        planned=len(vectors),
        digest=digest(list(cases.values()), (0,)),
    )
    if len(skipped) == len(vectors):
        return with_fields(body, reason=next(iter(skipped.values()))[0])
    compared = programs = structures = 0
    worst: float | None = None
    missing = ""
    for vector in vectors:
        path = record.file_of(answers, vector.name)
        if vector.name in skipped:
            continue
        if not path.exists() and vector.name not in told.failures:
            missing = missing or f"no answer to vector {vector.name}, which needs nothing that is unsupported"
            continue
        case, wants = cases[vector.name], stored(folder, manifest, vector)
        given = record.unpacked(path) if path.exists() else {}
        traces = [traced(p, given, n, told.failures.get(vector.name)) for n, p in enumerate(case.programs)]
        found = checked(manifest, vector, case, traces, wants, claims)
        structures, programs = structures + 1, programs + len(case.programs)
        if found.mismatch is not None:
            body = with_fields(body, programs=programs, structures=structures, found_after=programs, compared=compared)
            return _broken(body, case, found.mismatch, failures, began)
        compared += found.compared
        worst = found.worst if worst is None else max(worst, found.worst or 0.0)
    body = with_fields(
        body, programs=programs, structures=structures, compared=compared, worst=worst, seconds=_since(began)
    )
    if missing or not compared:
        why = missing or "nothing was compared"
        return with_fields(body, outcome=Outcome.NOT_EXERCISED, reason=Reason.NOTHING_COMPARED, sentence=why)
    return with_fields(body, outcome=Outcome.PASS, reason=None, sentence="")


def _broken(body: Verdict, case: Case, mismatch: Mismatch, failures: Path, began: float) -> Verdict:
    clause = BY_NAME[body.clause]
    outcome = Outcome.REFUTED if clause.level is Level.SHOULD else Outcome.FAIL
    counterexample = Counterexample(
        suite=SUITE_VERSION,
        clause=clause.name,
        backend=body.backend,
        device="cpu",
        outcome=outcome,
        mismatch=mismatch,
        sentence=render(mismatch),
        before=[],
        case=case.to_json(),
        reduced=False,
    )
    return with_fields(
        body,
        outcome=outcome,
        reason=None,
        mismatch=mismatch,
        sentence=render(mismatch),
        steps=steps(case, mismatch),
        counterexample=counterexample.write(failures).name,
        seconds=_since(began),
    )


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)


def skips(manifest: Manifest, vector: Vector, told: Answers) -> tuple[Reason, str] | None:
    """Why a runner may leave out a vector, or None."""
    profile = str(manifest.configs[vector.config].config["profile"])
    for name, reason in ((profile, Reason.PROFILE), (vector.config, Reason.REFUSED)):
        if name in told.unsupported:
            return reason, f"{name}: {told.unsupported[name]}"
    lacking = [f"{name}: {told.unsupported[name]}" for name in vector.needs if name in told.unsupported]
    return (Reason.ABILITY, "; ".join(lacking)) if lacking else None


# --- one vector ---
def checked(
    manifest: Manifest,
    vector: Vector,
    case: Case,
    traces: Sequence[Trace],
    wants: Sequence[Sequence[Expected | None]],
    claims: Claims,
) -> Checked:
    """What the relations of its clause find in the traces of a vector."""
    relations = [Relation[name] for name in manifest.clauses[vector.clause].relations]
    return judge(case, relations, claims, [Traces(1, trace) for trace in traces], wants)


def stored(folder: Path, manifest: Manifest, vector: Vector) -> list[list[Expected | None]]:
    """For each step of each program what the set says that it must give; a generation is judged along its tokens."""
    tensors = record.unpacked(record.file_of(folder, vector.name), vector.sha256)
    found = []
    for program, written in zip(record.case_of(manifest, vector).programs, vector.programs, strict=True):
        wants: list[Expected | None] = []
        for want, step in zip(expect(program, (0,)), written, strict=True):
            if want is not None and not isinstance(want, Generation):
                value, bound = (flat(program.config, tensors[step.tensors[role]]) for role in ("expected", "bound"))
                want = replace(want, numbers=_numbers(value[None], bound.astype(np.float64)[None]))
            wants.append(want)
        found.append(wants)
    return found


def _numbers(value: Array, bound: Array) -> Callable[[str], Array]:
    return lambda kind: value if kind == "value" else bound


def flat(config: Config, x: Array) -> Array:
    """The inverse of ``write.headed``."""
    if config.profile != "attention":
        return x
    b, h, t, d = x.shape
    return x.swapaxes(1, 2).reshape(b, t, h * d)


def traced(program: Program, given: Mapping[str, Array], number: int, failure: Failure | None) -> Trace:
    """The answers to one program as a trace, up to the first step without one."""
    trace: list[StepResult] = []
    for index, step in enumerate(program.steps):
        name = f"{number}.{index}"
        if failure is not None and (failure.program, failure.step) == (number, index):
            return (*trace, StepResult(error=Raised("Failure", failure.message)))
        asked = isinstance(step, Reject) or isinstance(called(step), Append | UncachedForward)
        if not asked:
            trace.append(StepResult())
        elif name not in given:
            return (*trace, StepResult(error=Raised("NoAnswer", f"the answers hold no tensor {name!r}")))
        elif isinstance(step, Reject):
            if given[name].dtype != np.uint8 or given[name].shape != (1,):
                told = f"tensor {name!r} is {given[name].dtype} {given[name].shape}, want uint8 (1,): 1 if refused"
                return (*trace, StepResult(error=Raised("NoAnswer", told)))
            trace.append(StepResult(refused=Raised("Refused", "the answers say so") if given[name][0] else None))
        else:
            trace.append(StepResult(output=given[name][None]))
    return tuple(trace)
