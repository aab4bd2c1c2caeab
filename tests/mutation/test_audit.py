"""The audit: whose faults it reads, what counts as a kill, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from mismatches import RAISED, cause
from places import SUPPORT

from kvconform.judging.verdict import Outcome, Verdict
from kvconform.mutation import audit as audits
from kvconform.mutation.audit import AuditPlan, audit, audit_fault
from kvconform.mutation.fault import Fault, load_faults
from kvconform.mutation.record import (
    Audited,
    AuditRecord,
    AuditTrial,
    exit_code,
    lines,
    progress,
    read,
    scores,
    summary,
)
from kvconform.search.cell import Cell, run_cell
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError

ELSEWHERE = str(SUPPORT / "third_party_faults.py")
BRIEF = Effort("brief", 4, 2, 60.0)
BROUGHT = {fault.name: fault for fault in load_faults(f"{ELSEWHERE}:ALL")}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kvconform", *words], capture_output=True, text=True, check=False)


# --- lists ---
def test_a_list_holds_classes_addresses_faults_and_what_looks_like_one() -> None:
    by_class, by_address, by_fault, by_attributes = load_faults(f"{ELSEWHERE}:MIXED")
    assert by_class == Fault(
        "last-output-only",
        f"{ELSEWHERE}:LastOutputOnly",
        ("shape.output",),
        "https://github.com/huggingface/optimum/issues/1913",
        "Only the last position's output comes back.",
        configs=("attention-gqa",),
    )
    assert (by_address.name, by_address.clauses, by_address.classes) == (
        "doubled",
        ("definition.attention", "shape.length"),
        ("M11",),
    )
    assert by_address.conditional
    assert by_fault.name == "by-fault"
    assert (by_attributes.name, by_attributes.clauses) == ("by-attributes", ("shape.output",))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("FAULTS", "want module:LIST or path/file.py:LIST, got 'FAULTS'"),
        ("no_such_module:LIST", "no_such_module cannot be imported: No module named 'no_such_module'"),
        ("no_such.py:LIST", "no_such.py cannot be imported: no file no_such.py"),
        (f"{ELSEWHERE}:ABSENT", "has no 'ABSENT'"),
        (f"{ELSEWHERE}:EMPTY", "is no list of faults: want a list or tuple that holds at least one"),
        (f"{ELSEWHERE}:NUMBER", "is no list of faults: want a list or tuple that holds at least one"),
        (f"{ELSEWHERE}:TWICE", "holds two faults named 'right'"),
        (f"{ELSEWHERE}:NOT_A_FAULT", r"NOT_A_FAULT\[1\]: want a backend class, its address or a Fault, got 7"),
        (f"{ELSEWHERE}:NOT_A_BACKEND", r"\[0\]: NoBackend declares no claims, so it is no backend"),
        (f"{ELSEWHERE}:NOT_THERE", r"\[0\]: backend .* has no 'Absent'"),
        (f"{ELSEWHERE}:HIDDEN", r"\[0\]: local.<locals>.Hidden is not at the top of .*: a worker cannot import it"),
        (f"{ELSEWHERE}:ONE_STRING", r"string.clauses: want a tuple of strings, got 'shape.output'"),
    ],
)
def test_what_is_wrong_with_a_list_is_one_sentence(address: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        load_faults(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("UNKNOWN_CLAUSE", "fault odd: no clause named 'shape.colour'; known: shape.output"),
        ("UNKNOWN_CONFIG", "fault odd: no config named 'attention-cubic'; known: attention-gqa"),
    ],
)
def test_a_fault_names_clauses_and_configs_that_there_are(name: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        AuditPlan((BRIEF,)).tasks(load_faults(f"{ELSEWHERE}:{name}"))


# --- plans ---
def test_shards_are_the_whole_in_parts() -> None:
    faults = tuple(BROUGHT.values())
    parts = [AuditPlan((BRIEF,), shard=(i, 4)).tasks(faults) for i in (1, 2, 3, 4)]
    assert sorted(task.fault.name for part in parts for task in part) == sorted(BROUGHT)
    assert all(parts)
    with pytest.raises(SpecError, match="9/9 holds nothing: there are 6 faults"):
        AuditPlan((BRIEF,), shard=(9, 9)).tasks(faults)


def test_names_keep_faults_or_clauses_that_begin_so() -> None:
    faults = tuple(BROUGHT.values())
    by_fault = AuditPlan((BRIEF,), names=("raises",))
    assert [task.fault.name for task in by_fault.tasks(faults)] == ["raises"]
    assert by_fault.tried(BROUGHT["raises"]) == list(BROUGHT["raises"].clauses)
    by_clause = AuditPlan((BRIEF,), names=("shape",))
    assert [task.fault.name for task in by_clause.tasks(faults)] == ["last-output-only", "doubled", "raises", "right"]
    assert by_clause.tried(BROUGHT["raises"]) == ["shape.output"]
    with pytest.raises(SpecError, match="no fault, and no clause of one, begins with nowhere"):
        AuditPlan((BRIEF,), names=("nowhere",)).tasks(faults)


def test_a_fault_is_tried_by_what_it_names_or_by_all() -> None:
    every = [clause.name for clause in ALL]
    assert AuditPlan((BRIEF,), clauses=("",)).tried(BROUGHT["raises"]) == every
    assert AuditPlan((BRIEF,)).tried(Fault("nameless", "a:B")) == every
    chosen = AuditPlan((BRIEF,), names=("raises",), clauses=("shape.", "capacity.full"))
    assert chosen.tried(BROUGHT["raises"]) == [n for n in every if n.startswith(("shape.", "capacity.full"))]
    assert [task.fault.name for task in chosen.tasks(tuple(BROUGHT.values()))] == ["raises"]


# --- kills ---
def test_a_judgement_kills_and_what_is_right_survives() -> None:
    killed = audit_fault(BROUGHT["doubled"], AuditPlan((BRIEF,)))
    attention, length = killed.trials
    assert (attention.clause, attention.outcome, attention.by) == ("definition.attention", Outcome.FAIL, "judgement")
    assert attention.kills
    assert attention.config == "attention-gqa"
    assert attention.programs > 0
    assert attention.seconds > 0
    assert "x the bound" in attention.sentence
    assert (length.clause, length.outcome, length.by, length.kills) == ("shape.length", Outcome.PASS, "", False)
    assert killed.kill("brief") is attention
    assert killed.missed("brief") == [length]
    assert audit_fault(BROUGHT["right"], AuditPlan((BRIEF,))).kill("brief") is None


def test_one_of_the_chosen_clauses_kills_a_fault_that_names_none_of_them() -> None:
    wrong = BROUGHT["doubled"]
    found_lines: list[str] = []
    chosen = AuditPlan((BRIEF,), clauses=("shape.output", "equivalence.decode"))
    found = audit_fault(wrong, chosen, lambda fault, trial: found_lines.append(progress(fault, trial)))
    assert found.clauses == ()
    assert [trial.clause for trial in found.trials if trial.kills] == ["equivalence.decode"]
    assert (kill := found.kill("brief")) is not None
    assert found_lines == [
        f"doubled: shape.output misses it after {found.trials[0].programs} programs (pass)",
        f"doubled: equivalence.decode [{kill.config}] kills it after {kill.programs} programs, {kill.seconds:.2f} s",
    ]


def test_a_chosen_clause_that_a_fault_names_must_kill_it() -> None:
    plan = AuditPlan((BRIEF,), clauses=("shape.length", "equivalence.decode"))
    found = audit_fault(BROUGHT["doubled"], plan)
    assert [trial.clause for trial in found.trials if trial.kills] == ["equivalence.decode"]
    assert found.kill("brief") is None
    assert [trial.clause for trial in found.missed("brief")] == ["shape.length"]


def test_an_exception_kills_for_no_clause_about_numbers() -> None:
    attention, output, full = audit_fault(BROUGHT["raises"], AuditPlan((BRIEF,))).trials
    assert {trial.by for trial in (attention, output, full)} == {"exception"}
    assert "the cache is haunted" in attention.sentence
    assert not attention.kills
    assert output.kills
    assert full.kills  # there, what is refused is the question


def test_a_death_kills_for_no_clause_about_numbers() -> None:
    audited = audit_fault(BROUGHT["dies"], AuditPlan((BRIEF,)))
    assert [(trial.outcome, trial.by, trial.kills) for trial in audited.trials] == [(Outcome.CRASH, "exception", False)]
    assert audited.kill("brief") is None
    assert "exception: " in next(lines(audited, ["brief"]))


def test_what_breaks_without_the_planted_path_is_no_kill() -> None:
    audited = audit_fault(BROUGHT["never-ran"], AuditPlan((BRIEF,)))
    assert [(trial.by, trial.ran, trial.kills) for trial in audited.trials] == [("judgement", 0, False)]
    assert "the faulty path never ran" in next(lines(audited, ["brief"]))


class Told:
    """A backend that was never started: its runtime_info is all that is asked."""

    def __init__(self, ran: int | None) -> None:
        self.ran = ran

    def runtime_info(self, config: object) -> dict[str, Any]:
        return {} if self.ran is None else {"faulty": self.ran}


@pytest.mark.parametrize(
    ("clause", "outcome", "raised", "ran", "kills"),
    [
        ("definition.attention", Outcome.FAIL, False, 3, True),
        ("definition.attention", Outcome.FAIL, False, None, True),
        ("definition.attention", Outcome.FAIL, False, 0, False),
        ("definition.attention", Outcome.FAIL, True, 3, False),
        ("definition.attention", Outcome.TIMEOUT, False, None, False),
        ("numerics.finite", Outcome.FAIL, True, 3, False),
        ("shape.length", Outcome.FAIL, True, 3, True),
        ("capacity.full", Outcome.CRASH, False, None, True),
        ("errors.unchanged", Outcome.FAIL, True, 3, True),
        ("definition.attention", Outcome.PASS, False, 3, False),
        ("definition.attention", Outcome.INCONCLUSIVE, False, 3, False),
        ("determinism.repeatable", Outcome.REFUTED, False, 3, False),  # named by no fault here
    ],
)
def test_what_counts_as_a_kill(
    clause: str, outcome: Outcome, raised: bool, ran: int | None, kills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"sentence": "so", "compared": 1, **cause(outcome)} | ({"mismatch": RAISED} if raised else {})
    verdict = Verdict(clause=clause, config="attention-gqa", backend="x", outcome=outcome, **fields)
    monkeypatch.setattr(audits, "run_cell", lambda *_: verdict)
    trial = audits._try(Fault("x", "a:X"), BY_NAME[clause], cast(WorkerClient, Told(ran)), BRIEF, 0)
    assert trial.kills is kills
    assert bool(trial.by) is (outcome not in (Outcome.PASS, Outcome.INCONCLUSIVE))


def test_a_refuted_guarantee_kills_a_fault_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "determinism.repeatable"
    fields = {"outcome": Outcome.REFUTED, "sentence": "so", **cause(Outcome.REFUTED)}
    verdict = Verdict(clause=name, config="attention-gqa", backend="x", **fields)
    monkeypatch.setattr(audits, "run_cell", lambda *_: verdict)
    trial = audits._try(Fault("x", "a:X", (name,)), BY_NAME[name], cast(WorkerClient, Told(1)), BRIEF, 0)
    assert (trial.kills, trial.by) == (True, "judgement")


def test_a_search_without_shrinking_writes_nothing_and_starts_nothing(tmp_path: Path) -> None:
    cell = Cell(BY_NAME["definition.attention"], CONFIGS["attention-gqa"], "attention-gqa")
    with WorkerClient(WorkerSpec(BROUGHT["doubled"].address)) as client:
        verdict = run_cell(cell, client, replace(BRIEF, shrink=False), 0, tmp_path)
        assert client.starts == 1
    assert (verdict.outcome, verdict.raised) == (Outcome.FAIL, False)
    assert verdict.found_after == verdict.programs > 0
    assert not list(tmp_path.iterdir())


# --- records ---
def audited(name: str, *trials: AuditTrial, **known: Any) -> Audited:
    fields = {
        "address": "a:B",
        "conditional": False,
        "classes": (),
        "clauses": (),
        "bug": "",
        "sentence": f"It is {name}.",
    }
    return Audited(**{"name": name, "trials": list(trials), **fields, **known})


def trial(
    kills: bool, programs: int = 1, effort: str = "smoke", clause: str = "shape.output", **known: Any
) -> AuditTrial:
    outcome = Outcome.FAIL if kills else Outcome.PASS
    seconds = programs / 10
    return AuditTrial(
        effort=effort, clause=clause, outcome=outcome, kills=kills, programs=programs, seconds=seconds, **known
    )


def record(*faults: Audited, controls: tuple[Audited, ...] = (), efforts: tuple[str, ...] = ("smoke",)) -> AuditRecord:
    made = AuditRecord(
        suite="0",
        faults="a:L",
        efforts=list(efforts),
        seed=0,
        names=[],
        clauses=[],
        shard="",
        started="",
        audited=list(faults),
        controls=list(controls),
    )
    made.scores = scores(made)
    return made


def test_the_score_tells_blatant_from_stealth_and_budget_from_budget() -> None:
    both = record(
        audited("one", trial(True, 5), trial(True, 3, clause="shape.length"), trial(True, 50, "pr")),
        audited("two", trial(True, 9), trial(True, 9, "pr")),
        audited("three", trial(True, 20), trial(False, 40, "pr"), conditional=True),
        audited("away", unavailable="no torch"),
        efforts=("smoke", "pr"),
    )
    found = [(s.effort, s.conditional, s.killed, s.faults, s.programs, s.seconds) for s in both.scores]
    assert found == [
        ("smoke", False, 2, 2, (6, 9), (0.6, 0.9)),  # of one fault, the clause that needed the fewest programs
        ("smoke", True, 1, 1, (20, 20), (2.0, 2.0)),
        ("pr", False, 2, 2, (29.5, 50), (2.95, 5.0)),
        ("pr", True, 0, 1, None, None),
    ]
    words = list(summary(both))
    assert words[0] == (
        "smoke, unconditional: 2 of 2 killed; programs to the kill: median 6, at most 9; "
        "seconds: median 0.60, at most 0.90"
    )
    assert "survives pr: three: It is three." in words
    assert "not audited: away: no torch" in words


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (record(audited("killed", trial(True))), 0),
        (record(audited("survivor", trial(False))), 1),
        (record(audited("other", trial(True, clause="shape.length"), clauses=("shape.output",))), 1),
        (record(audited("killed", trial(True)), controls=(audited("alarm", trial(True)),)), 1),
        (record(audited("killed", trial(True)), controls=(audited("fine", trial(False)),)), 0),
        (record(audited("killed", trial(True)), audited("away", unavailable="no torch")), 3),
        (record(audited("survivor", trial(False)), audited("away", unavailable="no torch")), 1),
    ],
    ids=["killed", "survivor", "killed-by-another", "alarm", "quiet-control", "absent", "survivor-and-absent"],
)
def test_the_exit_code_is_that_of_the_worst(made: AuditRecord, code: int) -> None:
    assert exit_code(made) == code


def test_an_alarm_is_told() -> None:
    made = record(audited("killed", trial(True)), controls=(audited("fine", trial(True, config="attention-gqa")),))
    assert any(
        words.startswith("false alarm: fine (It is fine.): shape.output [attention-gqa]") for words in summary(made)
    )


def test_the_file_is_whole_after_each_fault(tmp_path: Path) -> None:
    out, seen = tmp_path / "audit.json", []

    def tell(audited: Audited) -> None:
        now = read(out)
        seen.append((now.finished, [one.name for one in now.audited]))
        assert list(tmp_path.iterdir()) == [out]

    faults = [BROUGHT["last-output-only"], BROUGHT["right"]]
    made = audit(AuditPlan((BRIEF,)), "elsewhere", faults, [], out, tell=tell)
    assert seen == [(False, ["last-output-only"]), (True, ["last-output-only", "right"])]
    assert read(out) == made


def test_a_fault_that_cannot_run_here_is_told(tmp_path: Path) -> None:
    here = str(SUPPORT / "subjects.py")
    faults = [Fault("absent", "no_such_module:Name", ("shape.output",)), Fault("quantum", f"{here}:CannotRunHere")]
    made = audit(AuditPlan((BRIEF,)), "elsewhere", faults, [], tmp_path / "audit.json")
    assert "no module named 'no_such_module'" in made.audited[0].unavailable
    assert "quantum computer" in made.audited[1].unavailable
    assert exit_code(made) == 3


# --- the command ---
@pytest.mark.slow
def test_the_command_tells_survivors_and_exits_with_1(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    done = command("audit", "--effort", "smoke", "--faults", f"{ELSEWHERE}:SURVIVING", "--jobs", "2", "-o", str(out))
    assert done.returncode == 1, done.stderr
    assert "survives smoke: right: A correct backend." in done.stdout
    assert "last-output-only (unconditional): shape.output [attention-gqa] after " in done.stdout
    found = read(out)
    assert [one.name for one in found.audited] == ["last-output-only", "right"]
    assert found.finished
    assert (
        command(
            "audit", "last-output", "--effort", "smoke", "--faults", f"{ELSEWHERE}:SURVIVING", "-o", str(out)
        ).returncode
        == 0
    )


def test_a_control_is_tried_by_every_clause_and_what_breaks_is_an_alarm(tmp_path: Path) -> None:
    wrong = BROUGHT["doubled"]
    plan = AuditPlan((BRIEF,), names=("shape",))
    assert [plan.tried(wrong), replace(plan, clauses=("",)).tried(wrong)] == [
        ["shape.length"],
        [clause.name for clause in ALL if clause.chapter == "shape"],
    ]
    made = audit(plan, "elsewhere", [BROUGHT["right"]], [wrong], tmp_path / "audit.json")
    assert [one.name for one in made.audited] == ["right"]
    assert {alarm.clause for alarm in made.controls[0].alarms} == {"shape.first-step", "shape.no-specialisation"}
    assert len(made.controls[0].trials) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--faults", "nowhere:LIST"], "nowhere cannot be imported"),
        (["--effort", "endless"], "unknown effort 'endless'"),
        (["--clause", "some"], "no clause begins with 'some'; known: "),
    ],
)
def test_bad_usage_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    done = command("audit", *words, "-o", str(tmp_path / "audit.json"))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_schema_of_an_audit_is_printed() -> None:
    printed = json.loads(command("schema", "audit").stdout)
    assert "AuditTrial" in printed["$defs"]
