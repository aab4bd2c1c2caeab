"""The audit: do the clauses detect backends that are wrong on purpose? Faults by clauses, by what, and how fast.

A fault *survives* an effort where no clause that it names kills it. A clause kills where it breaks, where the faulty
path ran, and where it broke for its own reason: an exception is none for a clause about numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from kvconform.errors import BackendUnavailable
from kvconform.host import machine
from kvconform.judging.verdict import Outcome
from kvconform.mutation.fault import Fault
from kvconform.mutation.record import Audited, AuditRecord, AuditTrial, scores
from kvconform.search.cell import Cell, run_cell
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Clause
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError

REFUSALS = ("capacity", "errors")
"""Chapters about refused calls: there, an exception in a legal step is the mistake itself."""
UNBROKEN = (Outcome.PASS, Outcome.INCONCLUSIVE, Outcome.UNSUPPORTED, Outcome.NOT_EXERCISED)


@dataclass(frozen=True)
class AuditPlan:
    """What to audit.

    names: prefixes that keep faults, or clauses of each; empty keeps all. clauses: prefixes of the clauses that are
    tried on every fault; ``("",)`` is all of them; empty tries those that the fault names. shard: ``(i, n)`` keeps each
    n-th fault from the i-th on.
    """

    efforts: tuple[Effort, ...]
    seed: int = 0
    names: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None

    def tried(self, fault: Fault) -> list[str]:
        """The clauses to be tried on a fault."""
        named = fault.clauses if fault.clauses and not self.clauses else [clause.name for clause in ALL]
        kept = [name for name in named if not self.clauses or name.startswith(self.clauses)]
        return kept if fault.name.startswith(self.names or "") else [n for n in kept if n.startswith(self.names)]

    def tasks(self, faults: Sequence[Fault], controls: Sequence[Fault] = ()) -> list[Task]:
        """What there is to do; controls are tried by every clause unless clauses are chosen.

        Raises SpecError where there is nothing to do, or where a clause or config is unknown.
        """
        for prefix in self.clauses:
            if not any(name.startswith(prefix) for name in BY_NAME):
                raise SpecError("audit", f"no clause begins with {prefix!r}; known: {', '.join(BY_NAME)}")
        for fault in (*faults, *controls):
            for words, names, known in (("clause", fault.clauses, BY_NAME), ("config", fault.configs, CONFIGS)):
                for name in names:
                    if name not in known:
                        raise SpecError(f"fault {fault.name}", f"no {words} named {name!r}; known: {', '.join(known)}")
        every = replace(self, clauses=self.clauses or ("",))
        found = [Task(fault, self, False) for fault in faults if self.tried(fault)]
        found += [Task(control, every, True) for control in controls if every.tried(control)]
        if not found:
            raise SpecError("audit", f"no fault, and no clause of one, begins with {' or '.join(self.names)}")
        index, count = self.shard or (1, 1)
        if index > len(found):
            raise SpecError("shard", f"{index}/{count} holds nothing: there are {len(found)} faults")
        return found[index - 1 :: count]


class Task(NamedTuple):
    """One fault or control, to be tried as a plan says."""

    fault: Fault
    plan: AuditPlan
    control: bool


Executor = Callable[[Sequence[Task]], Iterator[tuple[int, Audited]]]
"""Audits tasks elsewhere: number and result of each as it ends."""


def audit(
    plan: AuditPlan,
    address: str,
    faults: Sequence[Fault],
    controls: Sequence[Fault],
    out: Path,
    jobs: int = 1,
    execute: Executor | None = None,
    tell: Callable[[Audited], None] = lambda audited: None,
    progress: Callable[[str, AuditTrial], None] = lambda fault, trial: None,
) -> AuditRecord:
    """Audits the faults and controls that the plan keeps, ``jobs`` at once, or by ``execute``.

    ``out`` is written after each; ``tell`` gets each fault as it is done, and ``progress`` each of its trials where
    there is one fault or one job. Raises SpecError where the plan does not fit.
    """
    began = time.perf_counter()
    tasks = plan.tasks(faults, controls)
    record = AuditRecord(
        suite=SUITE_VERSION,
        faults=address,
        efforts=[effort.name for effort in plan.efforts],
        seed=plan.seed,
        names=list(plan.names),
        clauses=list(plan.clauses),
        shard="/".join(map(str, plan.shard or ())),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        environment={"hypothesis": version("hypothesis"), "numpy": np.__version__, "machine": machine()},
    )
    found: dict[int, Audited] = {}
    for number, audited in _done(tasks, jobs, progress) if execute is None else execute(tasks):
        found[number] = audited
        record.audited = [found[i] for i in sorted(found) if not tasks[i].control]
        record.controls = [found[i] for i in sorted(found) if tasks[i].control]
        record.scores = scores(record)
        record.seconds = round(time.perf_counter() - began, 3)
        record.finished = len(found) == len(tasks)
        record.write(out)
        if not tasks[number].control:
            tell(audited)
    return record


def _done(
    tasks: Sequence[Task], jobs: int, progress: Callable[[str, AuditTrial], None]
) -> Iterator[tuple[int, Audited]]:
    """Number and result of each task as it ends. Several tasks run in processes: Hypothesis is for one thread."""
    if min(jobs, len(tasks)) == 1:
        yield from ((number, audit_fault(task.fault, task.plan, progress)) for number, task in enumerate(tasks))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that are started below inherit it
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(audit_fault, task.fault, task.plan): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # what runs is waited for


def audit_fault(
    fault: Fault, plan: AuditPlan, progress: Callable[[str, AuditTrial], None] = lambda fault, trial: None
) -> Audited:
    """Tries a fault under each clause in a fresh process, so that state left by one clause affects no other."""
    tried = plan.tried(fault)
    audited = Audited(
        name=fault.name,
        address=fault.address,
        conditional=fault.conditional,
        classes=fault.classes,
        clauses=fault.clauses if set(fault.clauses) & set(tried) else (),
        bug=fault.bug,
        sentence=fault.sentence,
    )
    try:
        with WorkerClient(WorkerSpec(fault.address)) as client:
            for effort in plan.efforts:
                for clause in tried:
                    if audited.trials:
                        client.fresh()
                    brief = replace(effort, shrink=False)
                    audited.trials.append(_try(fault, BY_NAME[clause], client, brief, plan.seed))
                    progress(fault.name, audited.trials[-1])
    except BackendUnavailable as sentence:
        audited.unavailable = str(sentence)
    return audited


def cells(fault: Fault, clause: Clause) -> Iterator[Cell]:
    """The cells of a clause, on the configs that the fault names, or on all that the clause concerns."""
    for name, config in CONFIGS.items():
        if (not fault.configs or name in fault.configs) and clause.concerns(config):
            yield Cell(clause, config, name)


def _try(fault: Fault, clause: Clause, client: WorkerClient, effort: Effort, seed: int) -> AuditTrial:
    """The first config on which the clause kills; else the first on which it breaks, else the last one judged."""
    best = AuditTrial(
        effort=effort.name,
        clause=clause.name,
        outcome=Outcome.UNSUPPORTED,
        sentence="it concerns none of the fault's configs",
    )
    programs, seconds = 0, 0.0
    for cell in cells(fault, clause):
        verdict = run_cell(cell, client, effort, seed, Path())  # without shrinking, nothing is written
        programs += verdict.found_after or verdict.programs
        seconds += verdict.seconds
        broke = verdict.outcome not in UNBROKEN
        raised = verdict.raised or verdict.outcome in (Outcome.CRASH, Outcome.TIMEOUT)
        ran = client.runtime_info(cell.config).get(fault.marker)
        numeric = any(relation.judges_numbers for relation in clause.relations)  # an exception breaks none of these
        own = not raised or clause.chapter in REFUSALS or not numeric
        charged = verdict.outcome.broken or clause.name in fault.clauses  # a guarantee may be refuted by right backends
        trial = msgspec.structs.replace(
            best,
            outcome=verdict.outcome,
            kills=broke and own and charged and ran != 0,
            config=cell.config_name,
            by="" if not broke else "exception" if raised else "judgement",
            ran=ran,
            sentence=verdict.sentence,
            programs=programs,
            seconds=round(seconds, 3),
        )
        if trial.kills:
            return trial
        if broke or (not best.by and (not best.config or verdict.outcome is not Outcome.UNSUPPORTED)):
            best = trial
    return msgspec.structs.replace(best, programs=programs, seconds=round(seconds, 3))
