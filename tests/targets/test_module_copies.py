"""Forks and new orders of rows of modules, and cached calls of one token: found by trial, or claimed from outside."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from in_process import broken
from places import SUPPORT

from kvconform.worker.execute import execute, feeds_of
from kvconform.worker.registry import load
from kvconform_specs.program import Append, Fork, Program, Reorder, Reset

torch = pytest.importorskip("torch", reason="modules are torch's")

from kvconform_backends.targets.module import target as module  # noqa: E402

pytestmark = pytest.mark.xdist_group("modules")

FILE = SUPPORT / "module_copies.py"
ASKED = (
    "equivalence.decode",
    "equivalence.chunks",
    "causality.past-seen",
    "lifecycle.fork",
    "lifecycle.reorder",
    "lifecycle.reset",
    "batch.row-solo",
)


def opened(name: str, **options: Any) -> Any:
    return module.open_module(f"{FILE}:{name}", options)


def test_a_past_of_arrays_is_copied_and_its_rows_are_picked() -> None:
    target = opened("Tuples")
    assert target.found.convention.fork == "copy.deepcopy(past)"
    assert target.found.convention.reorder == "tuple(tuple(yy[rows] for yy in xx) for xx in past)"
    assert "a sequence is forked by copy.deepcopy(past)" in target.assumed
    assert {"fork", "reorder"} <= {*target.claims.abilities}
    assert broken(target, ASKED, 4) == {}


def test_methods_of_the_cache_are_used_and_no_longer_listed_as_not_tried() -> None:
    target = opened("Methods")
    assert target.found.convention.fork == "past.clone()"
    assert target.found.convention.reorder == "past.reorder(torch.tensor(rows, device=device))"
    assert target.not_tried == ()
    assert broken(target, ASKED, 4) == {}


@pytest.mark.parametrize(
    ("name", "clause"), [("SharedCloneMethods", "lifecycle.fork"), ("KeysOnlyMethods", "lifecycle.reorder")]
)
def test_a_method_that_is_wrong_is_judged(name: str, clause: str) -> None:
    target = opened(name)
    assert clause.removeprefix("lifecycle.") in target.claims.abilities
    found = broken(target, ("equivalence.decode", clause), 12)
    assert {*found} == {clause}


def test_what_does_not_agree_in_trials_is_not_claimed() -> None:
    target = opened("Buffers")  # the rows are in the third axis, and the other ones are as many
    assert "fork" in target.claims.abilities
    assert "reorder" not in target.claims.abilities
    assert broken(target, ASKED, 4) == {}


def test_a_prompt_of_any_length_and_then_single_tokens_is_recognised() -> None:
    target = opened("PromptThenTokens")
    assert target.found.convention.one_by_one
    assert target.claims.max_chunk is None
    words = (
        "after the first call it is given one token at a time: given several, it raised ValueError: decode takes one"
    )
    assert any(said.startswith(words) for said in target.assumed)
    assert broken(target, ASKED, 4) == {}
    assert "equivalence.decode" in broken(opened("PromptThenTokensWrong"), ASKED, 9)


def test_one_token_at_a_time_can_be_given_from_outside() -> None:
    target = opened("PromptThenTokens", convention={"one_by_one": True})
    assert "after the first call it is given one token at a time" in target.assumed
    with pytest.raises(Exception, match=r"convention\.one_by_one: want true or false, got 'yes'"):
        opened("PromptThenTokens", convention={"one_by_one": "yes"})


def test_a_claim_from_outside_limits_the_trials() -> None:
    address = f"py:{FILE}:TokenKernel"
    assert "equivalence.chunks" in broken(load(address), ASKED, 9)
    claimed = load(f"{address}?{json.dumps({'claims': {'max_chunk': 1, 'max_batch': 2}})}")
    assert claimed.found.rank == (True, True, True, True)
    assert (claimed.claims.max_chunk, claimed.claims.max_batch) == (1, 2)
    assert broken(claimed, ASKED, 4) == {}


@pytest.mark.parametrize("name", ["Tuples", "Methods", "PromptThenTokens"])
def test_a_script_forks_reorders_and_calls_as_the_backend_does(name: str) -> None:
    target = opened(name)
    (config,) = target.configs.values()
    steps = (
        Append("a", (3, 3), 5),
        Append("a", (2, 2), 6),
        Fork("a", "b"),
        Reorder("a", (1, 1, 0)),
        Append("a", (1, 1, 1), 7),
        Append("b", (2, 2), 8),
        Reset("b"),
        Reorder("b", (0, 1, 1)),
        Append("b", (2, 2, 2), 9),
    )
    program = Program(config, steps)
    client = target(config, {}, "cpu")
    (trace,) = execute(client, program, (0,))
    assert [done.error for done in trace] == [None] * len(steps)
    x = {f"x7_{number}": given[0][0] for number, (given, _) in enumerate(feeds_of(program, (0,))) if given}
    names: dict[str, Any] = {"np": np, **x}
    grad = torch.is_grad_enabled()
    exec(client.script_setup() + client.script(program, "7_"), names)
    torch.set_grad_enabled(grad)
    for number, done in enumerate(trace):
        if done.output is not None:
            assert np.array_equal(names[f"y7_{number}"], done.output), number
