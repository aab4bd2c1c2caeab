"""Results are whole or not there, and the gate moves when they do, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from kvconform import gate
from kvconform.budget import BUDGETS
from kvconform.results import Results, exit_code, read, schema
from kvconform.run import Plan, run_backend
from kvconform.storage import write_atomically
from kvconform.subject import Launch
from kvconform.verdict import Outcome, Verdict
from kvconform_specs.errors import SpecError


def verdict(clause: str = "shape.output", outcome: Outcome = Outcome.PASS, **more: Any) -> Verdict:
    words = "" if outcome is Outcome.PASS else "it broke"
    fields: dict[str, Any] = {"compared": 10, "sentence": words, **more}
    return Verdict(clause=clause, config="attention-gqa", backend="x", outcome=outcome, **fields)


CLAIMS: dict[str, Any] = {"abilities": ["full", "reset"], "max_batch": None, "overflow": "refused"}


def results(*verdicts: Verdict, **more: Any) -> Results:
    fields: dict[str, Any] = {
        "claims": {"abilities": ["full", "reset"], "max_batch": None, "overflow": "refused"},
        **more,
    }
    return Results(
        suite="0", backend="x", device="cpu", dtypes=["float32"], budget="smoke", seed=0, started="now", finished=True,
        verdicts=list(verdicts), **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("now", "code", "words"),
    [
        (results(verdict()), 0, ""),
        (results(verdict(compared=11)), 0, ""),
        (results(verdict(outcome=Outcome.FAIL)), 1, "shape.output [attention-gqa]: pass -> fail: it broke"),
        (results(verdict(), verdict("shape.length", Outcome.CRASH)), 1, "shape.length [attention-gqa]: absent -> cr"),
        (results(verdict(outcome=Outcome.UNSUPPORTED)), 4, "pass -> unsupported: it broke"),
        (results(verdict(outcome=Outcome.INCONCLUSIVE)), 4, "pass -> inconclusive"),
        (results(verdict(outcome=Outcome.NOT_EXERCISED)), 4, "pass -> not exercised"),
        (results(verdict(compared=9)), 4, "compared 9 values, was 10"),
        (results(), 4, "shape.output [attention-gqa]: was pass, is gone"),
        (results(verdict(), claims={**CLAIMS, "abilities": ["full"]}), 4, "no longer claims abilities: reset"),
        (results(verdict(), claims={**CLAIMS, "max_batch": 2}), 4, "narrowed max_batch from unlimited to 2"),
        (results(verdict(), claims={**CLAIMS, "overflow": "undefined"}), 4, "narrowed overflow from refused"),
        (results(unavailable="no compiler"), 4, "no longer available: no compiler"),
        (results(verdict(), verdict("shape.length")), 0, "absent -> pass"),
    ],
)  # fmt: skip
def test_the_gate_moves_with_the_results(now: Results, code: int, words: str) -> None:
    differences = gate.compare(now, results(verdict()))
    assert gate.exit_code(differences) == code
    assert (words in "\n".join(d.words for d in differences)) if words else not differences


def test_results_of_another_device_or_budget_are_not_comparable() -> None:
    for change in ({"device": "cuda"}, {"budget": "nightly"}, {"seed": 1}, {"dtypes": ["float16"]}):
        differences = gate.compare(msgspec.structs.replace(results(verdict()), **change), results(verdict()))
        assert gate.exit_code(differences) == 4
        assert "not comparable" in differences[0].words


def test_a_failure_that_the_baseline_knows_is_not_new() -> None:
    broken = results(verdict(outcome=Outcome.FAIL))
    assert gate.exit_code(gate.compare(broken, broken)) == 0
    fixed = gate.compare(results(verdict()), broken)
    assert gate.exit_code(fixed) == 0
    assert "fail -> pass" in fixed[0].words


def test_only_conformance_exits_with_zero() -> None:
    assert exit_code(msgspec.structs.replace(results(verdict()), finished=False))[1].startswith(
        "the run did not finish"
    )
    assert exit_code(results(unavailable="no GPU")) == (3, "no GPU")
    assert exit_code(results(verdict(outcome=Outcome.FAIL)))[0] == 1
    assert exit_code(results(verdict(outcome=Outcome.FAIL), unavailable="no GPU"))[0] == 1
    assert exit_code(results(verdict(outcome=Outcome.INCONCLUSIVE)))[0] == 5
    assert "not exercised" in exit_code(results(verdict(outcome=Outcome.NOT_EXERCISED)))[1]
    code, sentence = exit_code(results(verdict()))
    assert code == 5
    assert "no PASS on the core clauses" in sentence
    assert "lifecycle.reset" in sentence


def test_a_results_file_fits_its_own_json_schema(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results(verdict(), verdict("shape.length", Outcome.FAIL)).write(path)
    jsonschema.validate(json.loads(path.read_text()), schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(path.read_text()), "verdicts": [{"clause": 3}]}, schema())


def test_what_is_no_results_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read(path)
    path.write_text("{")
    with pytest.raises(SpecError, match="holds no results"):
        read(path)
    data = msgspec.to_builtins(results(verdict()))
    path.write_text(json.dumps({**data, "schema": "kvconform-results/99"}))
    with pytest.raises(SpecError, match="unknown schema 'kvconform-results/99'; known: kvconform-results/1"):
        read(path)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_run_goes_on_where_an_unfinished_one_stopped_and_only_there(tmp_path: Path) -> None:
    plan = Plan(BUDGETS["smoke"], clauses=("shape.output", "shape.length"), configs=("attention-gqa",))
    whole = run_backend("numpy", Launch("numpy"), plan, tmp_path)
    assert [v.outcome for v in whole.verdicts] == [Outcome.PASS, Outcome.PASS]
    marked = msgspec.structs.replace(whole.verdicts[0], compared=123456)
    msgspec.structs.replace(whole, verdicts=[marked], finished=False).write(tmp_path / "numpy.json")
    resumed = run_backend("numpy", Launch("numpy"), plan, tmp_path)
    assert [v.compared for v in resumed.verdicts] == [123456, whole.verdicts[1].compared]
    again = run_backend("numpy", Launch("numpy"), plan, tmp_path)  # it was finished: begins anew
    assert [v.compared for v in again.verdicts] == [v.compared for v in whole.verdicts]
    msgspec.structs.replace(again, verdicts=[marked], finished=False, seed=1).write(tmp_path / "numpy.json")
    other = run_backend("numpy", Launch("numpy"), plan, tmp_path)  # another run's: not taken over
    assert [v.compared for v in other.verdicts] == [v.compared for v in whole.verdicts]


def test_a_run_is_not_resumed_once_the_backend_has_changed(tmp_path: Path) -> None:
    source = "from kvconform_backends.numpy_cache import NumpyCache\n\n\nclass Mine(NumpyCache):\n    pass\n"
    file = tmp_path / "mine.py"
    file.write_text(source)
    plan = Plan(BUDGETS["smoke"], clauses=("shape.output",), configs=("attention-gqa",))
    first = run_backend("mine", Launch(f"{file}:Mine"), plan, tmp_path)
    marked = msgspec.structs.replace(first.verdicts[0], compared=123456)
    msgspec.structs.replace(first, verdicts=[marked], finished=False).write(tmp_path / "mine.json")
    file.write_text(source + "# mended\n")
    assert (
        run_backend("mine", Launch(f"{file}:Mine"), plan, tmp_path).verdicts[0].compared == first.verdicts[0].compared
    )
