"""Black boxes whose forward is no function of the prefix: each step is judged by the forward on the tokens so far."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lanes import slow_except
from places import SUPPORT

from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.config import Config
from kvconform_specs.history import Request, Stream, epoch_of, prefixed
from kvconform_specs.reference.own_forward import Array, length_changes

MODULES = SUPPORT / "length_dependent.py"
CLAUSES = ("equivalence.full-stable", "equivalence.decode", "equivalence.chunks", "equivalence.path")
HIDDEN = Config("hidden", heads=1, kv_heads=1, head_dim=4, capacity=20, width=4)
pytestmark = pytest.mark.xdist_group("check")


def judged(address: str, folder: Path, clauses: tuple[str, ...] = CLAUSES, explain: bool = False) -> Results:
    plan = Plan(Effort("tiny", 12, 2, 30.0, shrink=False), clauses=clauses, explain=explain)
    return run_backend("box", WorkerSpec(address), plan, folder)


def broken(results: Results) -> set[str]:
    return {verdict.clause for verdict in results.verdicts if verdict.outcome.broken}


@pytest.mark.parametrize("name", slow_except(["Recomputed", "RecomputedLast", "Ntk"], 3))
def test_a_step_is_judged_by_the_forward_on_exactly_the_tokens_up_to_its_end(name: str, tmp_path: Path) -> None:
    found = judged(f"py:{MODULES}:{name}", tmp_path)
    assert not broken(found)
    passed = {verdict.clause for verdict in found.verdicts if verdict.outcome is Outcome.PASS}
    assert passed >= {"equivalence.full-stable", "equivalence.decode", "equivalence.chunks"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Stale", "StaleLast", "NtkStale"])
def test_keys_that_keep_the_angles_of_a_shorter_length_are_detected(name: str, tmp_path: Path) -> None:
    found = judged(f"py:{MODULES}:{name}", tmp_path)
    assert broken(found) >= {"equivalence.decode", "equivalence.chunks"}
    assert "equivalence.full-stable" not in broken(found)


def test_the_results_say_that_the_reference_is_no_function_of_the_prefix(tmp_path: Path) -> None:
    found = judged(f"py:{MODULES}:Recomputed", tmp_path, ("equivalence.full-stable",), explain=True)
    assert found.target is not None
    words = "its own forward is not a function of the prefix: with 13 tokens it gives the tokens before the last other"
    assert any(assumed.startswith(words) for assumed in found.target.assumed)


@pytest.mark.slow
def test_the_lengths_at_which_a_forward_changes_are_measured() -> None:
    for name, changes in (("Recomputed", (13,)), ("Ntk", tuple(range(13, 41))), ("StaleLast", ())):
        with WorkerClient(WorkerSpec(f"py:{MODULES}:{name}")) as client:
            (config,) = client.configs.values()
            client.build(config)
            assert client.claims.changes_at == changes


@pytest.mark.slow
def test_a_transformers_model_that_drops_its_cache_at_the_switch_passes(tmp_path: Path) -> None:
    """Phi-3 does so in ``prepare_inputs_for_generation``, which must see all ids."""
    pytest.importorskip("transformers")
    factors = '"short_factor":[1.0,1.0,1.0,1.0],"long_factor":[1.5,3.0,4.5,6.0],"original_max_position_embeddings":12'
    rope = f'{{"rope_type":"longrope","rope_theta":10000.0,{factors}}}'
    fields = f'{{"original_max_position_embeddings":12,"max_position_embeddings":40,"rope_parameters":{rope}}}'
    found = judged(f'hf:Phi3Config?{{"cache":"dynamic","config":{fields}}}', tmp_path, CLAUSES[:3])
    assert {verdict.outcome for verdict in found.verdicts} == {Outcome.PASS}


# --- what counts as a change of length ---
def summed(x: Array) -> Array:
    """Each output is the mean of the states up to its own."""
    return np.asarray(np.cumsum(x, axis=1) / np.arange(1, x.shape[1] + 1)[:, None], np.float32)


def test_a_forward_that_sees_later_tokens_does_not_count_as_one_that_changes_with_the_length() -> None:
    forwards = {
        "plain": lambda x: summed(x),
        "switches": lambda x: summed(x) * (1 + (x.shape[1] > 9)),
        "sees the future": lambda x: summed(x) + x.mean(axis=1, keepdims=True),
    }
    expected = {"plain": (), "switches": (10,), "sees the future": ()}
    for name, forward in forwards.items():

        def own(_config: Config, x: Array, storage: float, accumulation: float, seed: int, run=forward) -> Array:  # type: ignore[no-untyped-def]
            noise = np.random.default_rng(seed).uniform(-1, 1, x.shape[1:]) * (storage + 2 * accumulation)
            return np.asarray(run(x * (1 + noise)), np.float32)

        assert length_changes(own, HIDDEN) == expected[name], name


def test_a_forward_that_gives_other_numbers_each_time_does_not_count_either() -> None:
    calls = iter(range(10_000))

    def own(_config: Config, x: Array, _storage: float, _accumulation: float, _seed: int) -> Array:
        return summed(x) * np.float32(1 + next(calls))

    assert length_changes(own, HIDDEN) == ()


def test_rows_of_two_epochs_share_no_numbers() -> None:
    row = tuple((Stream(3), at) for at in range(6))
    short, long = Request(row[:4]), Request(row)
    assert prefixed([short, long]) == {long: long, short: long}
    assert prefixed([short, long], (5,)) == {long: long, short: short}
    assert prefixed([short, long], (3,)) == {long: long, short: long}
    assert [epoch_of(length, (3, 5)) for length in range(1, 7)] == [0, 0, 1, 1, 2, 2]
