"""A conversation with one engine: sends requests within limits, remembers what the engine has seen, and keeps the cold
answers: those to a request alone that read nothing from the prefix cache."""

from __future__ import annotations

import time
from bisect import bisect, insort
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from kvconform.serving.engine import Answer, Engine
from kvconform.serving.model import Model
from kvconform.serving.process import EngineDied, guarded
from kvconform_specs.serving.program import Program, Reset, request
from kvconform_specs.serving.requests import Request
from kvconform_specs.serving.strategies import Sizes

Tokens = tuple[int, ...]
ATTEMPTS = 2
"""How often a cold answer is asked for that was read from the cache."""
UNTOLD_BLOCK = 16
"""The block that programs are drawn for where the engine has none, or does not tell."""
SMALLEST_BLOCK = 4


@dataclass(frozen=True)
class Limits:
    """How much an engine is asked.

    requests: in all. seconds: after so many no program is begun. together: the most requests at the same time.
    """

    requests: int = 4000
    seconds: float = 150.0
    together: int = 6


class Spent(Exception):
    """The limits are reached."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request of a program with its answer. ``shared``: the most tokens that its prompt has in common with anything
    that the engine had seen under its salt and adapter. ``beside``: whether others were sent at the same time."""

    request: Request
    answer: Answer
    shared: int
    beside: bool


class Session:
    """``nonce`` begins the names of all permutations: an engine that was asked before has seen no prompt of it.
    ``model``: the address of the weights that the engine serves; empty: as its adapter says. ``by_model``: whether a
    clause is judged by them; otherwise they are not opened. Raises BackendUnavailable where they cannot be."""

    def __init__(self, engine: Engine, limits: Limits, nonce: int, model: str = "", *, by_model: bool = True) -> None:
        self.engine, self.limits = engine, limits
        self.facts = engine.describe()
        # other dtypes are too coarse for it to show anything, unless it is asked for
        weights = model or (engine.weights if self.facts.dtype == "float32" else "")
        self.model = Model(weights, self.facts, self.sizes.longest) if weights and by_model else None
        self.sent = self.hits = self.voids = 0
        self.began = time.monotonic()
        self._nonce, self._names = nonce, 0
        self._seen: dict[tuple[str | None, str | None], list[Tokens]] = defaultdict(list)
        self._cold: dict[Request, Answer | None] = {}

    @property
    def sizes(self) -> Sizes:
        """What programs are drawn for."""
        facts = self.facts
        concurrent = "concurrent" in facts.abilities
        return Sizes(
            block=facts.block if (facts.block or 0) >= SMALLEST_BLOCK and facts.block else UNTOLD_BLOCK,
            context=facts.context,
            together=self.limits.together if concurrent else 1,
            adapters=len(facts.adapters) if "adapter" in facts.abilities else 0,
            cache_tokens=facts.cache_tokens,
            abilities=facts.abilities,
        )

    def close(self) -> None:
        """Ends the model's process; the engine goes on."""
        if self.model is not None:
            self.model.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def fresh(self) -> int:
        """The name of a permutation that no program had."""
        self._names += 1
        return (self._nonce << 20) + self._names

    # --- requests ---
    def send(self, requests: Sequence[Request]) -> list[Sent]:
        """Raises Spent before a request that exceeds the limits, EngineDied where there is no answer."""
        if self.sent + len(requests) > self.limits.requests or self.seconds > self.limits.seconds:
            raise Spent
        self.sent += len(requests)
        with guarded():
            answers = self.engine.answer(requests)
        found, beside = [], len(requests) > 1
        for number, (one, answer) in enumerate(zip(requests, answers, strict=True)):
            others = [
                texts(other, theirs)
                for i, (other, theirs) in enumerate(zip(requests, answers, strict=True))
                if i != number and (other.salt, other.adapter) == (one.salt, one.adapter)
            ]
            shared = self._shared(one, [text for theirs in others for text in theirs])
            self.hits += bool(answer.cached)
            found.append(Sent(one, answer, shared, beside))
        for one, answer in zip(requests, answers, strict=True):
            for text in texts(one, answer):
                insort(self._seen[one.salt, one.adapter], text)
        return found

    def _shared(self, one: Request, beside: Sequence[Tokens]) -> int:
        known = self._seen[one.salt, one.adapter]
        place = bisect(known, one.prompt)
        near = [*known[max(place - 1, 0) : place + 1], *beside]  # in sorted order the longest is next to it
        return max((common(one.prompt, text) for text in near), default=0)

    def run(self, program: Program) -> list[list[Sent]]:
        """The program's requests with their answers, step by step; a reset has none."""
        found: list[list[Sent]] = []
        generated: list[list[Tokens]] = []
        for step in program.steps:
            if isinstance(step, Reset):
                with guarded():
                    self.engine.reset()
                found.append([])
            else:
                facts = self.facts
                asked = [
                    request(ask, program.permutation, generated, facts.vocabulary, facts.context, facts.adapters)
                    for ask in step.asks
                ]
                found.append(self.send(asked))
            generated.append([first_ids(sent.answer) for sent in found[-1]])
        return found

    def answers(self) -> None:
        """Asks for one token. Raises EngineDied where there is none."""
        self.send([Request((0,), cached=False)])

    def preempted(self) -> int:
        """How many requests the engine has preempted; 0 where it does not count them, or is not there any more."""
        with suppress(EngineDied):
            return self.engine.preemptions() if "preemptions" in self.facts.abilities else 0
        return 0

    # --- the reference ---
    def cold(self, one: Request, *, again: bool = False) -> Answer | None:
        """The answer to the request alone, without the cache; None where the engine read the cache all the same.
        ``again``: it is asked once more, whatever is known."""
        plain = replace(one, cached=False, n=1, abort_after=None, salt=None)
        if again or plain not in self._cold:
            self._cold[plain] = self._uncached(plain)
        return self._cold[plain]

    def _uncached(self, plain: Request) -> Answer | None:
        for _ in range(ATTEMPTS):
            answer = self.send([plain])[0].answer
            if not answer.cached:
                return answer
            self.voids += 1
        return None


def texts(one: Request, answer: Answer) -> list[Tokens]:
    """Prompt and answer of each completion; of a refused request, the prompt, which may have been computed."""
    return [one.prompt + completion.ids for completion in answer.completions] or [one.prompt]


def first_ids(answer: Answer) -> Tokens:
    return answer.completions[0].ids if answer.completions else ()


def common(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
