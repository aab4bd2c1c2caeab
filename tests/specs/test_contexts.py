"""A sequence's context: the same tokens in another one are other tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.describe import describe, described
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Close, Fork, Generate, Program, Reset, Step, Truncate, UncachedForward
from kvconform_specs.reference.definition import decoder
from kvconform_specs.reference.oracle import Generation, expect
from kvconform_specs.tensors import weights

ROPE = CONFIGS["decoder-rope"]


def program(*steps: Step, config: Config = ROPE) -> Program:
    return Program(config, steps)


def values(*steps: Step, config: Config = ROPE) -> list[np.ndarray]:
    return [want.value for want in expect(program(*steps, config=config)) if want is not None]


def test_context_0_is_no_context() -> None:
    with_contexts = values(Append("a", (4,), 5))
    without = values(Append("a", (4,), 5), config=replace(ROPE, contexts=1))
    assert np.array_equal(with_contexts[0], without[0])
    assert "context" not in weights(replace(ROPE, contexts=1))


def test_the_definition_adds_the_context_to_the_embedding_of_every_token() -> None:
    """So it is a decoder with another embedding."""
    held = {name: value.astype(np.float64) for name, value in weights(ROPE).items()}
    shifted = {**held, "embed": held["embed"] + held["context"][2]}
    tokens = np.arange(12).reshape(2, 6)
    assert np.array_equal(decoder(tokens, held, ROPE, context=2), decoder(tokens, shifted, ROPE))
    each = decoder(tokens, held, ROPE, context=np.array([1, 2]))
    assert np.allclose(each[1], decoder(tokens, shifted, ROPE)[1], rtol=0, atol=1e-12)


def test_outputs_depend_on_the_sequences_own_context_in_every_step() -> None:
    steps = [Append(seq, (n,), 5, context=context) for n in (3, 1) for context, seq in enumerate("abc")]
    grown = values(*steps)
    for context, seq in enumerate("abc"):
        (whole,) = values(UncachedForward(seq, (4,), 5, context=context))
        assert np.allclose(np.concatenate(grown[context::3], axis=2), whole, rtol=0, atol=1e-12)
        for other in grown[context + 1 : 3]:
            assert np.abs(grown[context] - other).min(axis=-1).max() > 0
            assert np.abs(grown[context] - other).max() > 0.1


def test_a_generation_is_judged_in_its_context() -> None:
    first, second = expect(program(*(Generate("g", (3,), 5, context=context, new=2) for context in (0, 1))))
    assert isinstance(first, Generation)
    assert isinstance(second, Generation)
    ids = np.zeros((1, 1, 2), np.int64)
    logits = second.along(ids)("value")
    (prompt,) = values(UncachedForward("u", (3,), 5, context=1))
    assert np.allclose(logits[:, :, 0], prompt[:, :, -1], rtol=0, atol=1e-12)
    assert np.abs(logits - first.along(ids)("value")).max() > 0.1


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((Append("a", (1,), 5, context=3),), r"steps\[0\]\.context: want a context of 0\.\.2, got 3"),
        ((UncachedForward("u", (1,), 5, context=-1),), r"steps\[0\]\.context: want a context of 0\.\.2, got -1"),
        (
            (Append("a", (1,), 5, context=1), Append("a", (1,), 5)),
            r"steps\[1\]\.context: sequence 'a' has the context 1, got 0",
        ),
        (
            (Append("a", (1,), 5, context=1), Fork("a", "f"), Append("f", (1,), 5, context=2)),
            r"steps\[2\]\.context: sequence 'f' has the context 1, got 2",
        ),
        (
            (Append("a", (1,), 5, context=1), Truncate("a", 0), Append("a", (1,), 5, context=2)),
            r"steps\[2\]\.context: sequence 'a' has the context 1, got 2",
        ),
    ],
)
def test_a_sequence_has_one_context(steps: tuple[Step, ...], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        program(*steps)


@pytest.mark.parametrize("end", [Reset("a"), Close("a")])
def test_a_sequence_that_was_reset_or_closed_may_have_another(end: Step) -> None:
    program(Append("a", (1,), 5, context=1), end, Append("a", (1,), 5, context=2))


def test_a_context_survives_its_own_json_and_is_told() -> None:
    made = program(Append("a", (2, 2), 5, context=1), UncachedForward("u", (2,), 5, context=2))
    assert Program.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert describe(made, 0) == "append 2 to a of 2 rows in context 1"
    assert [line.rpartition("; ")[2] for line in described(made)] == ["in context 1", "in context 2"]


def test_the_attention_profile_has_no_contexts() -> None:
    with pytest.raises(SpecError, match="the attention profile has no contexts"):
        replace(CONFIGS["attention-gqa"], contexts=2)
