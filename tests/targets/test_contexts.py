"""Black boxes whose sequences have a context: how it is told is recognised, and what is shared by it is found."""

from __future__ import annotations

import pytest
from in_process import broken
from lanes import slow_except
from places import SUPPORT

from kvconform.worker.registry import load

pytest.importorskip("torch", reason="modules are torch's")

FILE = SUPPORT / "modules_with_contexts.py"
CONTEXT = ("context.partition", "context.kept")
OTHERS = ("equivalence.decode", "equivalence.chunks", "lifecycle.independent", "batch.row-solo")
TOLD = {
    "SetAdapter": (3, "module.set_adapter(context)"),
    "TwoAdapters": (2, "module.set_adapter(context)"),
    "NamedAdapters": (3, "module.set_adapter(list(module.adapters)[context])"),
    "AdapterIds": (3, "adapter_ids"),
    "CrossAttention": (3, "encoder_hidden_states"),
    "OptionalStates": (3, "memory"),
    "EncoderOutputs": (3, "encoder_outputs"),
    "OwnsCrossCache": (3, "encoder_hidden_states"),
    "AttentionLayer": (3, "setattr(module, 'active_adapter', context)"),
}
"""Right decoders: how many contexts, and what tells them."""
WRONG = {
    "StoredByTokens": {"context.partition"},
    "IdsStoredByTokens": {"context.partition"},
    "OneAdapterForAll": {"context.kept"},
    "AdapterOfThePrompt": {"context.partition", "context.kept"},
    "CrossKeysOfTheFirst": {"context.partition"},
    "StatesOfThisCallOnly": {"context.kept"},
    "ResetKeepsCrossKeys": {"context.partition"},
    "AdapterOfTheFirst": {"context.partition", "context.kept"},
}
"""Wrong ones, with clauses that must find it."""


@pytest.mark.parametrize("name", slow_except(TOLD, 4))
def test_how_a_context_is_told_is_recognised_and_a_right_one_passes(name: str) -> None:
    target, (number, told) = load(f"py:{FILE}:{name}"), TOLD[name]
    (config,) = target.configs.values()
    assert config.contexts == number
    assert f"the context of a sequence, one of {number}, is given by {told} in each call" in target.assumed
    assert broken(target, (*CONTEXT, *OTHERS)) == {}


@pytest.mark.parametrize("name", slow_except(WRONG, 4))
def test_what_sequences_share_across_contexts_is_found(name: str) -> None:
    found = broken(load(f"py:{FILE}:{name}"), CONTEXT, examples=12)
    assert set(found) >= WRONG[name]


def test_a_wrong_prompt_store_passes_every_clause_about_tokens_alone() -> None:
    """So the chapter is needed."""
    assert broken(load(f"py:{FILE}:StoredByTokens"), OTHERS) == {}


def test_adapters_that_make_no_difference_are_no_contexts() -> None:
    target = load(f"py:{FILE}:Ignored")
    (config,) = target.configs.values()
    assert (config.contexts, "contexts" in target.claims.abilities) == (1, False)


@pytest.mark.slow
def test_an_adapter_that_a_token_tells_needs_no_context() -> None:
    asked = ("causality.visibility", "lifecycle.independent", *OTHERS)
    assert broken(load(f"py:{FILE}:ToldByAToken"), asked) == {}
    assert broken(load(f"py:{FILE}:TokenNotInTheKey"), asked, examples=60)
