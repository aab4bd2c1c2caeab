"""``kvconform check``: targets, the reference of a black box, and the printed output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import SUPPORT

from kvconform.errors import BackendUnavailable, BadArgument
from kvconform.judging.verdict import Outcome, Reason
from kvconform.results.results import Results, read
from kvconform.run import check
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.program import Append, Program
from kvconform_specs.reference.oracle import expect

BOXES = SUPPORT / "black_boxes.py"
PLAN = Plan(Effort("tiny", 6, 2, 20.0))
pytestmark = pytest.mark.xdist_group("check")


def judged(name: str, folder: Path) -> Results:
    return run_backend(name, WorkerSpec(f"{BOXES}:{name}"), PLAN, folder)


def outcomes(results: Results) -> dict[str, Outcome]:
    return {verdict.clause: verdict.outcome for verdict in results.verdicts}


def kvconform(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvconform", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


# --- what a target is ---
def test_each_kind_of_target_has_its_addresses(tmp_path: Path) -> None:
    file, onnx = tmp_path / "a.py", tmp_path / "decoder.onnx"
    file.touch()
    onnx.touch()
    assert check.addresses(f"{file}:Net", {}) == [f"py:{file}:Net"]
    assert check.addresses("package.module:Net", {"init": {"d": 3}}) == ['py:package.module:Net?{"init": {"d": 3}}']
    assert check.addresses(str(onnx), {}) == [f"onnx:{onnx}"]
    assert check.addresses("numpy", {}) == ["numpy"]
    assert check.addresses("hf:GPT2Config", {}) == [
        f'hf:GPT2Config?{{"cache": "{cache}"}}' for cache in ("dynamic", "static")
    ]
    assert check.addresses("hf:GPT2Config", {"cache": "static"}) == ['hf:GPT2Config?{"cache": "static"}']


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("numpi", "unrecognised target 'numpi'; expected file.py:NAME"),
        ("absent.py:Net", "no file absent.py"),
        ("absent.onnx", "no file absent.onnx"),
        ("a.py:not a name", "unrecognised target"),
    ],
)
def test_what_is_no_target_is_one_sentence_that_lists_the_forms(target: str, words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        check.addresses(target, {})


def test_options_are_json_and_a_bare_word_is_a_word() -> None:
    assert check.options('{"d": 3}', ["cache=static", "seed=4"]) == {"init": {"d": 3}, "cache": "static", "seed": 4}
    for init, others, words in (
        ("{", [], "init: init is not valid JSON"),
        ("[1]", [], "init: want a JSON object"),
        ("", ["cache"], "option: want NAME=JSON, got 'cache'"),
        ("", ["config={1}"], "option: config is not valid JSON"),
    ):
        with pytest.raises(BadArgument, match=words):
            check.options(init, others)


# --- judged by its own forward ---
def test_a_correct_black_box_is_conformant(tmp_path: Path) -> None:
    found = judged("BlackBox", tmp_path)
    assert (found.exit_code, found.summary) == (0, "conformant: hidden profile, judged by its own forward")
    assert found.target is not None
    assert found.target.recognised == "hidden states in and out, written for a test"
    worst = max(verdict.worst or 0.0 for verdict in found.verdicts)
    assert 0.0 < worst < 0.2  # as DESIGN.md says


@pytest.mark.slow
def test_clauses_that_the_reference_cannot_show_are_unsupported_as_blind(tmp_path: Path) -> None:
    blind = [name for name, clause in BY_NAME.items() if clause.blind and "decoder" in clause.profiles]
    assert blind
    for verdict in judged("BlackBox", tmp_path).verdicts:
        if verdict.clause in blind:
            assert verdict.outcome is Outcome.UNSUPPORTED
            assert verdict.reason is Reason.REFERENCE


@pytest.mark.slow
def test_a_token_dropped_by_the_cached_path_is_detected(tmp_path: Path) -> None:
    found = outcomes(judged("DropsOldest", tmp_path))
    assert {name for name, outcome in found.items() if outcome.broken} >= {
        "equivalence.decode",
        "equivalence.chunks",
        "causality.past-seen",
    }


@pytest.mark.slow
def test_an_error_of_a_ten_thousandth_in_the_cached_path_is_detected(tmp_path: Path) -> None:
    assert outcomes(judged("OffBy", tmp_path))["equivalence.decode"] is Outcome.FAIL


@pytest.mark.slow
def test_an_unreliable_reference_is_reported_and_not_used(tmp_path: Path) -> None:
    found = judged("NotCausal", tmp_path)
    assert found.exit_code == 1
    assert [v.clause for v in found.verdicts if v.outcome.broken] == ["equivalence.full-stable"]
    others = {v.outcome for v in found.verdicts if v.clause != "equivalence.full-stable"}
    assert others == {Outcome.INCONCLUSIVE, Outcome.UNSUPPORTED}


@pytest.mark.slow
def test_a_reference_disturbed_by_cached_steps_is_reported_and_still_used_in_its_own_process(tmp_path: Path) -> None:
    found = outcomes(judged("Perturbed", tmp_path))
    assert found["equivalence.full-stable"] is Outcome.FAIL
    assert found["equivalence.chunks"] is Outcome.FAIL  # it compares with the forward in the backend's own process
    assert found["lifecycle.reset"] is Outcome.PASS


@pytest.mark.slow
def test_rounding_shared_by_the_tokens_of_a_call_is_not_a_leak(tmp_path: Path) -> None:
    found = outcomes(judged("Wavers", tmp_path))
    assert found["causality.future-blind"] is Outcome.PASS
    assert not any(outcome.broken for outcome in found.values())


@pytest.mark.slow
def test_an_exception_of_the_reference_is_reported(tmp_path: Path) -> None:
    broken = [verdict for verdict in judged("Raises", tmp_path).verdicts if verdict.outcome.broken]
    assert broken
    assert all("at most nine tokens" in verdict.sentence for verdict in broken)


def test_the_reference_process_runs_no_cached_steps() -> None:
    """``Perturbed`` would show it: after a step in the backend, its reference must equal that of a fresh process."""
    with (
        WorkerClient(WorkerSpec(f"{BOXES}:Perturbed")) as client,
        WorkerClient(WorkerSpec(f"{BOXES}:BlackBox")) as right,
    ):
        (config,) = client.configs.values()
        program = Program(config, (Append("a", (5, 5), 1),))
        for one in (client, right):
            one.build(config)
            one.run(program, (0,))
        values = []
        for one in (client, right):
            assert one.reference_forward is not None
            (want,) = expect(program, reference=one.reference_forward(config))
            assert want is not None
            values.append(want.value)
        assert (values[0] == values[1]).all()


# --- output ---
@pytest.mark.slow
def test_a_check_prints_the_convention_the_assumptions_and_the_failures(tmp_path: Path) -> None:
    done = kvconform("check", f"{BOXES}:DropsOldest", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    judging, first, second, *others = done.stdout.splitlines()
    assert judging.startswith("judging py:")
    assert first == "DropsOldest: hidden states in and out, written for a test"
    assert second == "  assumed: no more than 24 tokens are tried"
    assert any(line.startswith("  noise floor [hidden-self]: rounding moves outputs by at most ") for line in others)
    replays = [line.split("kvconform ", 1)[1].split("   ")[0] for line in others if "replay: " in line]
    assert len(replays) == check.SHOWN
    assert kvconform(*replays[0].split(), folder=tmp_path).returncode == 1
    found = read(tmp_path / "results" / "check" / "DropsOldest.json")
    assert found.maps["hidden-self"]
    assert "DropsOldest: non-conformant: " in done.stdout


@pytest.mark.slow
def test_a_check_as_json_prints_the_results_and_nothing_else(tmp_path: Path) -> None:
    done = kvconform("check", f"{BOXES}:BlackBox", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)
    assert found["target"]["assumed"] == ["no more than 24 tokens are tried"]
    assert found["claims"]["reference"] == "self"


@pytest.mark.slow
def test_a_target_that_cannot_be_opened_is_one_sentence_and_exit_code_3(tmp_path: Path) -> None:
    done = kvconform("check", f"{BOXES}:Absent", folder=tmp_path)
    assert done.returncode == 3
    assert "Absent" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_an_unknown_kind_of_option_does_not_start_a_worker() -> None:
    with pytest.raises(BackendUnavailable, match="not valid JSON"):
        WorkerClient(WorkerSpec("py:a.py:Net?{"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numpy", "eager"])
def test_a_shipped_backend_as_a_black_box_is_conformant(name: str, tmp_path: Path) -> None:
    found = run_backend(name, WorkerSpec(f"{BOXES.with_name('wrapped_backends.py')}:{name}"), PLAN, tmp_path)
    assert (found.exit_code, found.summary) == (0, "conformant: decoder profile, judged by its own forward")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "named"),
    [("TopLeftMask", "equivalence.decode", "M1"), ("UnmaskedChunk", "equivalence.chunks", "M2")],
)
def test_the_first_failure_of_a_published_listing_is_the_direct_one(
    name: str, first: str, named: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the listings are in torch")
    clauses = ("causality", "equivalence.decode", "equivalence.chunks", "shape.first-step")
    plan = Plan(Effort("tiny", 6, 2, 20.0), clauses=clauses, explain=True)
    found = run_backend(name, WorkerSpec(f"py:{SUPPORT / 'published_listings.py'}:{name}"), plan, tmp_path)
    assert len(found.failures) > 2
    assert found.failures[0].clause == first
    assert found.diagnoses["decoder-self"].mistake == named
    printed = list(check.lines(found, tmp_path))
    broken = next(index for index, line in enumerate(printed) if line.startswith("broken: "))
    assert printed[broken].startswith(f"broken: {first}: step ")
    assert printed[broken + 1].startswith("  steps: append 1 to a")
    assert any(line.startswith("  not tried: rows of different lengths") for line in printed)
