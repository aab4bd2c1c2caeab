"""An engine in a process of its own: how it ends is a result, and the others are judged all the same."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from kvconform.judging.verdict import Outcome, Reason
from kvconform.results.results import Results
from kvconform.search.effort import EFFORTS
from kvconform.serving import process, search
from kvconform.serving.counterexample import read
from kvconform.serving.process import EngineDied, EngineGone, EngineProcess
from kvconform.serving.replay import replayed
from kvconform.serving.run import run_engine
from kvconform.serving.session import Limits
from kvconform_specs.serving.requests import Request

CLAUSES = ("serving.prefix-hit", "serving.batch-invariant")


@pytest.fixture(autouse=True)
def few_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a start."""
    monkeypatch.setattr(search, "SHRINK_DEATHS", 2)


def address(name: str) -> str:
    return f"engine:engines:{name}"


def run(name: str, folder: Path, clauses: tuple[str, ...] = CLAUSES) -> Results:
    return run_engine(name, address(name), EFFORTS["smoke"], 0, folder, Limits(), clauses)


def outcomes(found: Results) -> dict[str, Outcome]:
    return {verdict.clause: verdict.outcome for verdict in found.verdicts}


def test_a_segmentation_fault_is_a_crash_that_is_replayed_and_the_rest_is_judged(tmp_path: Path) -> None:
    found = run("Ends", tmp_path)
    assert found.finished
    told = outcomes(found)
    assert told["serving.prefix-hit"] is Outcome.CRASH
    assert told["serving.batch-invariant"] in (Outcome.PASS, Outcome.REFUTED), "it is started again"
    (broken,) = [verdict for verdict in found.failures if verdict.clause == "serving.prefix-hit"]
    assert "the engine gave no answer: the process died of SIGSEGV" in broken.sentence
    stored = read(tmp_path / "failures" / "Ends" / broken.counterexample)
    mismatch = replayed(stored, address("Ends"), Limits())
    assert mismatch is not None
    assert mismatch.ended is not None
    assert mismatch.ended.signal == "SIGSEGV"


def test_a_process_that_somebody_kills_is_no_verdict(tmp_path: Path) -> None:
    found = run("Killed", tmp_path, ("serving.prefix-hit",))
    (verdict,) = found.verdicts
    assert (verdict.outcome, verdict.reason) in (
        (Outcome.INCONCLUSIVE, Reason.KILLED),
        (Outcome.INCONCLUSIVE, Reason.OUT_OF_MEMORY),  # where the system's count of kills cannot be read
    )
    assert "SIGKILL" in verdict.sentence


def test_an_engine_that_gives_no_answer_is_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(process, "STARTS", 4)
    found = run("Hangs", tmp_path, ("serving.prefix-hit",))
    assert outcomes(found) == {"serving.prefix-hit": Outcome.TIMEOUT}
    assert "no answer within 1 s" in found.verdicts[0].sentence


def test_an_engine_that_ends_while_it_starts_is_unavailable(tmp_path: Path) -> None:
    found = run("EndsAtOnce", tmp_path)
    assert found.unavailable.startswith("the engine does not start: the process died of SIGSEGV")
    assert found.exit_code == 3


def test_what_an_engine_raises_and_what_it_lacks_come_through_the_pipe() -> None:
    one = Request((1, 2, 3), 1)
    with closing(EngineProcess(address("Dies"))) as engine:
        with pytest.raises(EngineDied, match="ConnectionError: connection reset by peer"):
            engine.answer([one, one])
        assert engine.answer([one])[0].completions, "it is started again"
        assert engine.starts == 2
        assert "from engines import Dies" in engine.source()
    with closing(EngineProcess("toy-engine")) as engine:
        assert engine.starts == 1
        assert engine.preemptions() == 0


def test_an_engine_that_ends_each_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STARTS", 2)
    prompt = [Request(tuple(range(40)), 1)]
    with closing(EngineProcess(address("Ends"))) as engine:
        for _ in range(2):
            engine.answer(prompt)
            with pytest.raises(EngineDied, match="SIGSEGV"):
                engine.answer(prompt)
        with pytest.raises(EngineGone, match="its process has ended 2 times"):
            engine.answer(prompt)
    found = run("Ends", tmp_path)
    assert Outcome.INCONCLUSIVE in outcomes(found).values()
    assert found.verdicts[-1].sentence.startswith("not judged: the engine gives no answer any more: EngineGone")


def test_an_engine_that_closes_its_pipe_and_lives_on_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.5)
    with closing(EngineProcess(address("ClosesItsPipe"))) as engine, pytest.raises(EngineDied, match="SIGKILL"):
        engine.answer([Request((1, 2, 3), 1)])
