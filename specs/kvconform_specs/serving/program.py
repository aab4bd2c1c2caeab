"""Programs of requests to a serving engine, as frozen data that survives JSON.

A program is a list of steps: requests that are sent at the same time, or a reset of the prefix cache. A prompt is a
list of pieces: tokens of a stream that a seed names, or tokens that an earlier request of the program has generated.
The program's ``permutation`` renames all token ids: the structure stays, and nothing of it can be in the cache already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from kvconform_specs.errors import SpecError
from kvconform_specs.serving.requests import Request
from kvconform_specs.tensors import raw

_TOKENS, _PERMUTATION = 4, 5  # second word of the generator's key: one generator for each purpose
Generated = Sequence[Sequence[Sequence[int]]]
"""The token ids that each request of each earlier step has generated."""


class Span(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="span", tag_field="piece"):
    """The tokens of a stream from one position to before another."""

    seed: int
    """Seed of the stream."""
    start: int = 0
    """Position of the first token, in tokens from 0."""
    stop: int
    """Position behind the last token, in tokens."""
    add: int = 0
    """Added to each token id before it is renamed, modulo the vocabulary (no unit): 1 surely gives another token."""


class Own(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="own", tag_field="piece"):
    """Tokens that an earlier request of the program has generated, in its first completion."""

    step: int
    """Index of the step, from 0."""
    request: int = 0
    """Index of the request in the step, from 0."""
    start: int = 0
    """Index of the first of the generated tokens, from 0."""
    stop: int
    """Index behind the last one."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request of a program; the fields are those of `Request`, with names as numbers."""

    prompt: tuple[Span | Own, ...]
    """The pieces of the prompt."""
    tokens: int = 4
    """How many tokens to generate."""
    cached: bool = True
    """Whether the prefix cache may be read."""
    n: int = 1
    """How many completions, no unit."""
    abort_after: int | None = None
    """The client leaves after so many tokens."""
    salt: int | None = None
    """Number of a salt, no unit, from 0; each run of the program has its own. -1: the name of the first adapter."""
    adapter: int | None = None
    """Number of an adapter, no unit, among those that the engine has, modulo their count."""
    score: bool = False
    """Whether the prompt's own log-probabilities are asked for."""
    too_long: bool = False
    """Whether the prompt is continued beyond the engine's context, so that the request must be refused."""

    @property
    def length(self) -> int:
        """Tokens of the prompt, those beyond the context not counted."""
        return sum(piece.stop - piece.start for piece in self.prompt)


class Together(msgspec.Struct, frozen=True, kw_only=True, tag="together", tag_field="op"):
    """Requests that are sent at the same time."""

    asks: tuple[Ask, ...]
    """The requests, at least one."""


class Reset(msgspec.Struct, frozen=True, kw_only=True, tag="reset", tag_field="op"):
    """The prefix cache is emptied."""


class Program(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Steps, one after another. `about` names what the program tries."""

    steps: tuple[Together | Reset, ...]
    """What is done, in order."""
    about: str = ""
    """The situation that the program is drawn for; for people and for counting."""
    permutation: int = 0
    """Seed of the renaming of the vocabulary."""

    @property
    def size(self) -> tuple[int, int]:
        """Requests and their tokens in all: a counterexample is small by it."""
        asks = [ask for step in self.steps if isinstance(step, Together) for ask in step.asks]
        return len(asks), sum(ask.length + ask.tokens * ask.n for ask in asks)

    def renamed(self, permutation: int) -> Program:
        """The same program with other token ids."""
        return msgspec.structs.replace(self, permutation=permutation)

    def to_json(self) -> Any:
        return msgspec.to_builtins(self)

    @classmethod
    def from_json(cls, data: object, at: str = "program") -> Program:
        """Raises SpecError where the data is no program."""
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise SpecError(at, str(error)) from None


@lru_cache(maxsize=256)
def stream(seed: int, stop: int, vocabulary: int) -> tuple[int, ...]:
    """Token ids of a stream, positions 0 to ``stop - 1``; they do not depend on ``stop``."""
    return tuple(int(word % vocabulary) for word in raw(seed, _TOKENS, 0, 4 * stop)[::4].tolist())


@lru_cache(maxsize=64)
def renaming(permutation: int, vocabulary: int) -> tuple[int, ...]:
    """A permutation of the token ids."""
    return tuple(raw(permutation, _PERMUTATION, 0, vocabulary).argsort(kind="stable").tolist())


def request(
    ask: Ask, permutation: int, generated: Generated, vocabulary: int, context: int, adapters: Sequence[str] = ()
) -> Request:
    """The request of a program, once what it refers to is generated. Where fewer tokens were generated than it refers
    to, tokens of a stream stand for the others."""
    names, prompt = renaming(permutation, vocabulary), []
    for piece in ask.prompt:
        if isinstance(piece, Own):
            own = tuple(generated[piece.step][piece.request][piece.start : piece.stop])
            missing = piece.stop - piece.start - len(own)
            prompt += [*own, *(names[token] for token in stream(0, missing, vocabulary))]
        else:
            ids = stream(piece.seed, piece.stop, vocabulary)[piece.start :]
            prompt += [names[(token + piece.add) % vocabulary] for token in ids]
    if ask.too_long:
        prompt += stream(1, max(context + 1 - len(prompt), 0), vocabulary)
    return Request(
        prompt=tuple(prompt),
        tokens=ask.tokens,
        cached=ask.cached,
        n=ask.n,
        abort_after=ask.abort_after,
        salt=None if ask.salt is None else salt_named(ask.salt, f"kvconform-{permutation}", adapters),
        adapter=None if ask.adapter is None or not adapters else adapters[ask.adapter % len(adapters)],
        score=ask.score,
    )


def salt_named(number: int, run: str, adapters: Sequence[str]) -> str:
    """The salt of a request, in a run with that name."""
    return adapters[0] if number < 0 and adapters else f"{run}-{number}"


def described(program: Program) -> str:
    """The steps in a line: lengths of prompts, and what each request shares with earlier ones."""
    return ", then ".join(
        "reset" if isinstance(step, Reset) else " beside ".join(map(_ask, step.asks)) for step in program.steps
    )


def _ask(ask: Ask) -> str:
    words = [f"{'+'.join(map(_piece, ask.prompt)) or 'nothing'}: {ask.tokens} to generate"]
    words += [f"n {ask.n}"] * (ask.n > 1) + ["scored"] * ask.score + ["beyond the context"] * ask.too_long
    words += [] if ask.abort_after is None else [f"aborted after {ask.abort_after}"]
    words += [] if ask.salt is None else [f"salt {ask.salt}"]
    words += [] if ask.adapter is None else [f"adapter {ask.adapter}"]
    words += ["not from the cache"] * (not ask.cached)
    return f"({', '.join(words)})"


def _piece(piece: Span | Own) -> str:
    if isinstance(piece, Own):
        return f"answer {piece.step}.{piece.request}[{piece.start}:{piece.stop}]"
    return f"s{piece.seed}[{piece.start}:{piece.stop}]" + (f"+{piece.add}" if piece.add else "")
